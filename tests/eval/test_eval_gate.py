"""A recipe's gate: what it lets through, and what becomes of an artifact that it does not."""

import json
import math
import os
from contextlib import nullcontext

import pytest
from conftest import GOLDEN, refused
from evaluations import FILES, evaluation, finding

from cosyq.artifact.reader import open_artifact
from cosyq.audit import verify_artifact
from cosyq.cli.console import choose_artifact
from cosyq.errors import RecipeError
from cosyq.eval import gated
from cosyq.eval.gate import check, misses
from cosyq.eval.metrics import METRICS
from cosyq.recipe import Limit, find_recipe, load_recipe


def missed(found, **limit):
    return misses({found.metric.key: Limit.model_validate(limit)}, evaluation(findings=(found,)))


@pytest.mark.parametrize(
    ("limit", "low", "high", "passes"),
    [
        ({"max": 5.0}, 3.0, 5.0, True),
        ({"max": 5.0}, 3.0, 5.0001, False),
        ({"min": 3.0}, 3.0, 5.0, True),
        ({"min": 3.0}, 2.9999, 5.0, False),
        ({"min": 3, "max": 5}, 3.0, 5.0, True),
        ({"min": 3, "max": 5}, 2.0, 6.0, False),
    ],
)
def test_the_worse_end_of_the_interval_counts(limit, low, high, passes):
    found = finding("spoken.duration", 0.0, -0.1, 0.1, artifact=(4.0, low, high))
    assert (missed(found, **limit) == []) == passes


@pytest.mark.parametrize(
    ("key", "low", "high", "passes"),
    [
        ("spoken.errors", -9.0, 2.0, True),
        ("spoken.errors", -9.0, 2.0001, False),
        ("llm.top1", -2.0, 9.0, True),
        ("llm.top1", -2.0001, 9.0, False),
        ("spoken.duration", -2.0, 2.0, True),
        ("spoken.duration", -2.0001, 0.0, False),
        ("spoken.duration", 0.0, 2.0001, False),
    ],
)
def test_a_difference_counts_where_it_is_for_the_worse(key, low, high, passes):
    assert (missed(finding(key, (low + high) / 2, low, high), max_difference=2.0) == []) == passes


def test_a_distance_is_its_own_difference():
    found = finding("llm.kl", artifact=(0.03, 0.02, 0.05))
    assert missed(found, max_difference=0.05) == []
    assert missed(found, max_difference=0.0499)
    assert missed(finding("llm.kl", artifact=(0.0, 0.0, 0.0)), max_difference=0, max=0) == []


@pytest.mark.parametrize("limit", [{"max": 1e9}, {"min": -1e9}, {"max_difference": 1e9}])
def test_what_is_not_known_never_passes(limit):
    nothing = (math.nan,) * 3
    for key in METRICS:
        assert missed(finding(key, *nothing, artifact=nothing), **limit)
        assert missed(finding(key, 0, 0, 0, artifact=(0, 0, 0), items=1, needed=None), **limit)
        assert missed(finding(key, 0, 0, 0, artifact=(0, 0, 0)), **limit) == []
    (miss,) = misses({"llm.kl": Limit.model_validate(limit)}, evaluation(findings=()))
    assert "llm.kl was not measured" in str(miss)


def test_a_miss_says_what_was_found_what_is_allowed_and_what_to_do():
    (miss,) = missed(finding("spoken.errors", 3.0, 2.5, 3.5), max_difference=2)
    assert str(miss) == "spoken.errors is +3.00 [+2.50, +3.50], allowed worse by at most 2 %"
    assert "more bits" in miss.remedy
    (miss,) = missed(finding("spoken.errors", 1.0, -0.5, 3.5), max_difference=2)
    assert "more sequences" in miss.remedy
    found = missed(finding("llm.kl", artifact=(0.2, 0.1, 0.3)), min=0.5, max=0.05)
    assert [miss.allowed for miss in found] == ["at most 0.05 nats", "at least 0.5 nats"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["gate={llm.kll: {max: 1}}"], "gate.llm.kll: no such metric; there are llm.kl, llm.top1"),
        (["gate={spoken.errors: {max: 1}}"], "gate.spoken.errors: needs a recognizer; add evaluate"),
        (["gate={spoken.truncated: {max: 1}}"], "gate.spoken.truncated: needs a recognizer"),
        (["gate={spoken.mos: {min: 1}}"], "gate.spoken.mos: needs a predictor"),
    ],
)
def test_what_nothing_measures_is_said_before_a_checkpoint_is_opened(changes, message, cli, tmp_path):
    overrides = [option for change in changes for option in ("--set", change)]
    for more in ([], ["--dry-run"]):
        result = cli("quantize", "int8", "--source", tmp_path / "missing", "-o", tmp_path / "a", *overrides, *more)
        refused(result, 2, message)
    assert list(tmp_path.iterdir()) == []


def test_what_is_measured_passes_the_check():
    gate = "{spoken.errors: {max: 1}, spoken.mos: {min: 3}, llm.kl: {max: 1}}"
    recipe = load_recipe(find_recipe("mini"), [f"gate={gate}", "evaluate={recognizer: pocketsphinx, mos: true}"])
    check(recipe)
    with pytest.raises(RecipeError, match=r"evaluate\.recognizer"):  # a recipe names no program to run
        load_recipe(find_recipe("mini"), ["evaluate.recognizer='command:touch /tmp/x'"])


@pytest.fixture
def output(tmp_path, monkeypatch):
    """A folder to quantize into; what the reference says is kept beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "tiny"


TINY = ("int8", "--source", GOLDEN, "--set", "voices=[]")


def quantize(cli, output, *options, recipe=TINY, gate="{llm.kl: {max: 0.05}}"):
    return cli("quantize", *recipe, "--device", "cpu", "-o", output, "--set", f"gate={gate}", *options)


def test_a_refused_artifact_is_kept_aside_with_all_that_was_found(cli, output, monkeypatch):
    """Measured indeed, on three short texts."""
    monkeypatch.setattr(gated, "own_texts", lambda *_: ["Yes.", "Good day.", "Come in."])
    limits = "{llm.kl: {max: 0}, vocoder.stft: {max: 0}}"
    result = quantize(cli, output, "--set", "evaluate.sequences=8", "--json", recipe=["mini"], gate=limits)
    line = refused(result, 3, f"{output}.rejected: refused by the recipe's gate: llm.kl is ", "allowed at most 0 nats")
    assert "vocoder.stft" not in line  # which is float32 on both sides
    assert json.loads(result[1])["error"]["exit_code"] == 3
    assert [entry.name for entry in output.parent.iterdir()] == ["tiny.rejected"]
    aside = open_artifact(output.parent / "tiny.rejected")
    verify_artifact(aside)
    found = json.loads((aside.folder / "eval.json").read_text())
    assert found["measured"] == {name: aside.manifest.files[name].sha256 for name in FILES}
    kl = next(entry for entry in found["findings"] if entry["key"] == "llm.kl")
    assert kl["items"] == 3
    assert 0 < kl["low"] < kl["value"] < kl["high"] < 0.1
    page = (aside.folder / "report.html").read_text("utf-8")
    assert "<h3" in page
    assert page.count("<audio") == 6


def test_a_judge_that_cannot_judge_is_said_before_anything_is_packed(cli, output, monkeypatch):
    monkeypatch.setattr(gated, "build", None)
    options = ("--set", "evaluate={recognizer: pocketsphinx}")
    result = quantize(cli, output, *options, gate="{spoken.errors: {max_difference: 2}}")
    refused(result, 2, "pocketsphinx", "knows en and not zh")
    result = quantize(cli, output, "--set", "evaluate={recognizer: 'whisper:none'}", gate="{spoken.errors: {max: 2}}")
    refused(result, 2, "whisper: ")
    assert list(output.parent.iterdir()) == []


@pytest.fixture
def measured(monkeypatch):
    """What will be found, in place of the minutes that finding it takes."""

    def say(outcome):
        def evaluate(artifact, *_, **__):
            if isinstance(outcome, BaseException):
                raise outcome
            files = {name: artifact.manifest.files[name].sha256 for name in FILES}
            return evaluation(findings=outcome, files=files)

        monkeypatch.setattr(gated, "lossless", lambda *_, **__: nullcontext())
        monkeypatch.setattr(gated, "evaluate", evaluate)

    return say


def test_one_that_passes_has_its_record_and_the_bytes_that_it_has_without_a_gate(cli, output, measured):
    measured((finding("llm.kl", artifact=(0.03, 0.02, 0.04)),))
    code, out, err = quantize(cli, output, "--json")
    assert code == 0, err
    assert json.loads(out)["gate"] == {
        "llm.kl": {side: {"value": 0.03, "low": 0.02, "high": 0.04} for side in ("artifact", "difference")}
    }
    assert [entry.name for entry in output.parent.iterdir()] == ["tiny"]
    assert (output / "eval.json").is_file()
    plain = output.parent / "plain"
    assert cli("quantize", *TINY, "--device", "cpu", "-o", plain)[0] == 0
    assert open_artifact(output).manifest == open_artifact(plain).manifest
    code, _, err = quantize(cli, output, "--force")
    assert code == 0
    assert "kept to its gate: llm.kl" in err


def test_what_was_there_stays_until_another_passes(cli, output, measured):
    measured((finding("llm.kl", artifact=(0.03, 0.02, 0.06)),))
    assert cli("quantize", *TINY, "--device", "cpu", "-o", output)[0] == 0
    before = (output / "manifest.json").read_bytes()
    aside = output.parent / "tiny.rejected"
    aside.mkdir()
    (aside / "mine.txt").write_text("not an artifact")
    refused(quantize(cli, output), 3, f"{output}: exists already")
    measured(KeyboardInterrupt())  # it is said before minutes go into measuring
    result = quantize(cli, output, "--force")
    refused(result, 3, f"{aside}: is not an artifact and will not be replaced")
    measured((finding("llm.kl", artifact=(0.03, 0.02, 0.06)),))
    (aside / "mine.txt").unlink()
    for _ in range(2):  # the second takes the place of the first
        result = quantize(cli, output, "--force", "--set", "stages.llm.weights=nf4")
        refused(result, 3, "llm.kl is 0.030 [0.020, 0.060], allowed at most 0.05 nats", "more sequences")
        assert (output / "manifest.json").read_bytes() == before
        assert open_artifact(aside).manifest.recipe["stages"]["llm"]["weights"] == "nf4"
        assert sorted(entry.name for entry in output.parent.iterdir()) == ["tiny", "tiny.rejected"]


@pytest.mark.parametrize(("outcome", "code"), [(KeyboardInterrupt(), 130), (MemoryError(), 4)])
def test_an_interrupted_measurement_leaves_nothing(outcome, code, cli, output, measured):
    measured(outcome)
    assert quantize(cli, output)[0] == code
    assert list(output.parent.iterdir()) == []


def test_a_refused_artifact_is_not_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COSYQ_ARTIFACT", raising=False)
    for age, name in enumerate(("b.rejected", ".a.partial-1", "a", "older")):
        path = tmp_path / "artifacts" / name / "manifest.json"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    assert choose_artifact(None).name == "a"
