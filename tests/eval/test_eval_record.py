"""The record of an evaluation: what a card shows of it, how its numbers are said, and whose it is."""

import json
import math
from dataclasses import replace

import pytest
from conftest import GOLDEN, refused
from evaluations import FILES, MODULES, evaluation, finding
from stand_in_hub import REPO

from cosyq.artifact.edit import put_voice
from cosyq.artifact.reader import open_artifact
from cosyq.errors import ArtifactError
from cosyq.eval.metric import Interval
from cosyq.eval.record import record, write_record
from cosyq.eval.wording import verdict, written
from cosyq.publish.card import model_card
from cosyq.publish.reports import read_report


@pytest.mark.parametrize(
    ("interval", "signed", "text"),
    [
        ((0.0312345, 0.0281234, 0.0345678), False, "0.0312 [0.0281, 0.0346]"),
        ((12.3456, 9.1, 15.9), False, "12.3 [9.1, 15.9]"),
        ((1234.5, 1000.0, 1500.0), False, "1,230 [1,000, 1,500]"),
        ((0.8, -1.24, 2.96), True, "+0.8 [-1.2, +3.0]"),
        ((-0.0004, -0.3, 0.3), True, "+0.00 [-0.30, +0.30]"),
        ((3.1e-6, 2.2e-6, 4.4e-6), False, "3.1e-06 [2.2e-06, 4.4e-06]"),
        ((0.0, 0.0, 0.0), True, "0"),
        ((0.123456, 0.123456, 0.123456), False, "0.123"),
        ((-2.0, -2.0, -2.0), True, "-2"),
        ((math.nan, 0.0, 1.0), False, "not finite"),
        ((1.0, 0.0, math.inf), False, "not finite"),
    ],
)
def test_numbers_are_as_exact_as_their_interval(interval, signed, text):
    assert written(Interval(*interval), signed=signed) == text


@pytest.mark.parametrize(
    ("key", "difference", "expected"),
    [  # the claims are 1 %, 0.1 and 0.05 s
        ("spoken.errors", (0.5, -0.3, 1.0), "held"),
        ("spoken.errors", (0.5, -0.3, 1.01), "open"),
        ("spoken.errors", (2.0, 1.01, 3.0), "lost"),
        ("spoken.errors", (-2.0, -3.0, -1.01), "gained"),
        ("spoken.errors", (-2.0, -3.0, 0.9), "held"),
        ("spoken.mos", (-0.2, -0.3, -0.11), "lost"),
        ("spoken.mos", (0.2, 0.11, 0.3), "gained"),
        ("spoken.mos", (0.0, -0.11, 0.3), "open"),
        ("spoken.duration", (0.0, -0.05, 0.05), "held"),
        ("spoken.duration", (-0.1, -0.2, -0.06), "lost"),
        ("spoken.duration", (0.1, 0.06, 0.2), "lost"),
        ("spoken.duration", (0.0, -0.01, 0.2), "open"),
        ("spoken.errors", (math.nan, math.nan, math.nan), "open"),
        ("spoken.duration", (0.0, math.nan, 0.01), "open"),
    ],
)
def test_a_verdict_is_of_the_whole_interval(key, difference, expected):
    assert verdict(finding(key, *difference)) == expected
    assert verdict(finding(key, *difference, needed=None)) == "open"  # of one item


def test_the_record_has_a_table_and_all_it_was_made_of():
    shown = evaluation()
    found = record(shown)
    assert found == record(shown)
    assert found["about"] == "tiny-nf4 beside tiny-fp32: 24 utterances, made up."
    assert found["measured"] == FILES
    row = dict(zip(found["columns"], found["rows"][3], strict=True))
    assert row == {
        "measure": "words (Chinese: characters) that a recognizer gets wrong, % (spoken.errors)",
        "artifact": "12.8 [10.1, 15.6]",
        "reference": "12.0 [9.7, 14.4]",
        "difference": "+0.8 [-1.2, +2.9]",
        "loss": "open",
        "items": "24",
    }
    assert found["rows"][0][1:5] == ["0.0312 [0.0281, 0.0345]", "", "", "lost"]
    assert found["findings"][3] == {
        "key": "spoken.errors",
        "unit": "%",
        "better": "lower",
        "claim": 1.0,
        "value": 12.8,
        "low": 10.1,
        "high": 15.6,
        "reference": {"value": 12.0, "low": 9.7, "high": 14.4},
        "difference": {"value": 0.8, "low": -1.2, "high": 2.9},
        "verdict": "open",
        "items": 24,
        "needed": 30,
    }
    assert [tuple(module.values()) for module in found["modules"]] == list(MODULES)
    assert found["extra"] == {"recognizer": "made up 1.0"}
    assert "Said 0." not in json.dumps(found)


def test_it_is_read_back_and_shown_in_the_card(artifact_of, tmp_path):
    manifest = open_artifact(artifact_of("nf4")).manifest
    write_record(tmp_path / "eval.json", evaluation())
    text = (tmp_path / "eval.json").read_text("utf-8")
    report = read_report(tmp_path / "eval.json")
    assert report.measured == FILES
    assert [list(row) for row in report.rows] == json.loads(text)["rows"]
    quality = model_card(manifest, REPO, {"eval.json": report}).split("\n## Quality\n")[1].split("\n## ")[0]
    assert "tiny-nf4 beside tiny-fp32" in quality
    assert "| 12.8 \\[10.1, 15.6] | 12.0 \\[9.7, 14.4] | +0.8 \\[-1.2, +2.9] | open | 24 |" in quality
    assert "the weights whose hashes are below" in quality
    assert "hashes are below" not in model_card(manifest, REPO, {"eval.json": replace(report, measured={})})


def test_what_is_not_finite_is_no_number_in_it(tmp_path):
    odd = evaluation(
        findings=(finding("spoken.errors", math.nan, math.nan, math.nan),), modules=(("llm.norm", "fp32", 1, math.nan),)
    )
    write_record(tmp_path / "eval.json", odd)

    def refuse(constant):
        raise AssertionError(constant)

    data = json.loads((tmp_path / "eval.json").read_text("utf-8"), parse_constant=refuse)
    assert data["findings"][0]["difference"] == {"value": None, "low": None, "high": None}
    assert data["modules"][0]["rms_error"] is None
    assert read_report(tmp_path / "eval.json").rows[0][3] == "not finite"


def test_the_record_of_other_weights_is_not_pushed(hub, cli, scratch_artifact, artifact_of, voice):
    """A voice that came since changes nothing of what was measured."""

    def measured(folder):
        files = open_artifact(folder).manifest.files
        return {name: files[name].sha256 for name in FILES}

    write_record(scratch_artifact / "eval.json", evaluation(files=measured(scratch_artifact)))
    put_voice(open_artifact(scratch_artifact), "golden", voice.to_bytes())
    code, _, err = cli("push", scratch_artifact, REPO, "--with-voices")
    assert code == 0, err
    head = dict(hub.repositories[REPO].head())
    assert json.loads(head["eval.json"])["measured"] == measured(scratch_artifact)
    assert b"Measured on the weights" in head["README.md"]

    write_record(scratch_artifact / "eval.json", evaluation(files=measured(artifact_of("nf4"))))
    result = cli("push", scratch_artifact, REPO)
    refused(result, 3, "eval.json: was measured on other weights", "llm.safetensors", "cosyq eval ARTIFACT --save")
    assert hub.repositories[REPO].head() == head


@pytest.mark.parametrize("measured", [[], "x", {"llm.safetensors": ["a"]}, {"llm.safetensors": None}])
def test_what_is_no_account_of_what_was_measured(measured, tmp_path):
    content = {"about": "x", "columns": ["a"], "rows": [["b"]], "measured": measured}
    (tmp_path / "eval.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="not a report"):
        read_report(tmp_path / "eval.json")


def test_cosyq_eval_writes_page_and_record(hub, cli, scratch_artifact, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = tmp_path / "texts.txt"
    texts.write_text("hello\none two\n")
    options = ("--against", GOLDEN, "--texts", texts, "--device", "cpu", "--json")
    for where in (tmp_path, tmp_path / "none" / "report.html"):
        refused(cli("eval", scratch_artifact, "-o", where, *options), 2, f"{where}: no file can be written there")
    refused(cli("eval", "hf://me/tiny", "--save", *options), 2, "not changed in place")
    report = tmp_path / "report.html"
    code, out, err = cli("eval", scratch_artifact, "-o", report, "--save", *options)
    assert code == 0, err
    told = json.loads(out)
    assert (told["page"], told["saved"]) == (str(report), str(scratch_artifact / "eval.json"))
    kept = json.loads((scratch_artifact / "eval.json").read_text())
    assert {finding["key"]: finding["value"] for finding in kept["findings"]} == {
        key: finding["artifact"]["value"] for key, finding in told["findings"].items()
    }
    assert kept["extra"] == {}
    page = report.read_text("utf-8")
    assert page.count("<article") == 2
    assert "hello" in page
    assert cli("push", scratch_artifact, REPO)[0] == 0
    assert "divergence of the next id" in hub.repositories[REPO].head()["README.md"].decode()
