"""cosyq eval as a user meets it: the table, its JSON, what is kept between runs, and what is refused."""

import json
import re
import shutil

import pytest
from conftest import GOLDEN, REPOSITORY, make_artifact, refused

from cosyq.artifact.edit import put_voice
from cosyq.artifact.reader import open_artifact
from cosyq.eval import metrics, run
from cosyq.eval.sentences import sentences, spread
from cosyq.random_model import SMALL, write_random

CPU = ("--device", "cpu")
EXACT = [metric.key for metric in metrics.EXACT]


@pytest.fixture(autouse=True)
def kept(monkeypatch, tmp_path):
    """The user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cosyq" / "sequences"


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("hello\n\n  one two  \n", "utf-8")
    return path


def measured(cli, *arguments):
    code, out, err = cli("eval", *arguments, *CPU, "--json")
    assert code == 0, err
    return json.loads(out)


def test_against_the_checkpoint_it_was_made_from(cli, artifact_of, texts, kept, monkeypatch):
    report = measured(cli, artifact_of("nf4"), "--against", GOLDEN, "--texts", texts)
    assert report.keys() == {"artifact", "against", "about", "findings", "peak_memory_bytes"}
    assert (report["artifact"], report["against"]) == ("fun-cosyvoice3-0.5b-nf4", "fp32")
    assert re.match(r"2 utterances of \d+ speech ids .* \(seed 0, 1 voice\); float32 on cpu", report["about"])
    found = report["findings"]
    assert [key for key in EXACT if key not in found] in ([], ["llm.stop"])  # where both ran to their bound
    for row in found.values():
        for side in ("artifact", "reference", "difference"):
            if row[side] is not None:
                assert row[side]["low"] <= row[side]["value"] <= row[side]["high"]
    assert found["llm.kl"]["difference"]["low"] > 0
    assert found["llm.nll"]["reference"] is not None
    assert found["flow.lsd"] | {"items": 2, "unit": "dB", "claim": 0.1, "reference": None} == found["flow.lsd"]
    assert len(list(kept.iterdir())) == 1

    monkeypatch.setattr(run, "speak", None)  # what the reference said is kept, for another artifact of it too
    other = measured(cli, artifact_of("int8"), "--against", GOLDEN, "--texts", texts)
    assert 0 < other["findings"]["llm.kl"]["artifact"]["value"] < found["llm.kl"]["artifact"]["value"]


def test_against_itself_the_table_is_zeros(cli, artifact_of, texts, tmp_path):
    sequences = tmp_path / "said.json"
    code, out, err = cli(
        "eval", artifact_of("int8"), "--against", artifact_of("int8"), "--texts", texts, "--limit", "1",
        "--sequences", sequences, "--seed", "5", *CPU,
    )  # fmt: skip
    assert code == 0, err
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in out.splitlines()}
    assert [key for key in EXACT if key not in rows] in ([], ["llm.stop"])
    for key, (_, artifact, reference, difference, items, needed) in rows.items():
        assert (items, needed[:2]) == ("1", "? ")
        if reference:
            assert (artifact.split()[0], difference) == (reference, "0 [0, 0]")
        else:
            assert artifact == ("100 [100, 100]" if key == "llm.top1" else "0 [0, 0]")
    assert re.search(r"^1 utterance of \d+ .*seed 5", err, re.M)
    assert json.loads(sequences.read_text())["spoken"][0]["seed"] == 5


def test_every_voice_of_the_artifact_says_something(cli, artifact_of, voice, texts, tmp_path):
    artifact = shutil.copytree(artifact_of("int8"), tmp_path / "artifact")
    for name in ("b", "a"):
        put_voice(open_artifact(artifact), name, voice.to_bytes())
    sequences = tmp_path / "said.json"
    report = measured(cli, artifact, "--against", GOLDEN, "--texts", texts, "--sequences", sequences)
    assert [item["voice"] for item in json.loads(sequences.read_text())["spoken"]] == ["a", "b"]
    assert "2 voices" in report["about"]


def test_what_is_refused(cli, artifact_of, texts, kept, tmp_path):
    artifact = artifact_of("int8")
    refused(cli("eval", artifact, *CPU), 2, "does not say where", "--against DIR")
    refused(cli("eval", artifact, "--against", tmp_path / "none", *CPU), 2, "no such artifact and no such checkpoint")
    refused(cli("eval", artifact, "--against", "owner/name", *CPU), 2, "REPO@REV")
    refused(cli("eval", tmp_path / "none", *CPU), 3, "no such artifact")
    refused(cli("eval", artifact, "--against", tmp_path, *CPU), 3)
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    refused(cli("eval", artifact, "--against", GOLDEN, "--texts", empty, *CPU), 2, "empty.txt", "no text")
    empty.write_text("Speak slowly.<|endofprompt|>hello\n")
    refused(cli("eval", artifact, "--against", GOLDEN, "--texts", empty, *CPU), 2, "endofprompt")
    write_random(tmp_path / "random", SMALL, seed=0)
    other = make_artifact(tmp_path / "other", "int8", "stages.flow.steps=[4]", source=tmp_path / "random")
    refused(cli("eval", artifact, "--against", other, "--texts", texts, *CPU), 2, "other dimensions")
    steps = artifact_of("int8", "stages.flow.steps=[4]")
    refused(cli("eval", artifact, "--against", steps, "--texts", texts, *CPU), 2, "no table for so many flow steps")
    sequences = tmp_path / "said.json"
    sequences.write_text('{"origin": "another", "spoken": []}')
    arguments = ("--against", GOLDEN, "--texts", texts, "--sequences", sequences, *CPU)
    refused(cli("eval", artifact, *arguments), 3, "said.json", "another model", "remove it")
    assert not list(kept.iterdir())


def test_a_cache_that_cannot_be_written_is_said_before_anything_is_spoken(
    cli, artifact_of, texts, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(texts))
    monkeypatch.setattr(run, "speak", None)
    arguments = ("--against", artifact_of("int8"), "--texts", texts, *CPU)
    refused(cli("eval", artifact_of("int8"), *arguments), 3, "cannot be written", "XDG_CACHE_HOME")


# ---- the sentences


def test_the_sentences_were_never_trained_on():
    def plain(text):
        return " ".join(re.findall(r"[\w']+", text.lower()))

    training = REPOSITORY / "training" / "mini"
    known = {plain(line.replace("*", "")) for line in (training / "heldout.txt").read_text("utf-8").splitlines()}
    lists = (training / "sentences.py").read_text("utf-8")
    known |= {plain(entry) for entry in re.split(r"[|\n]", lists)}
    ours = [plain(text) for text in sentences("en")]
    assert len(ours) == len(set(ours)) >= 60
    assert not known & set(ours)
    assert len(set(sentences("zh"))) == len(sentences("zh")) >= 40
    assert all(re.search("[\u4e00-\u9fff]", text) and not re.search("[a-z]", text) for text in sentences("zh"))


def test_a_limit_takes_from_all_of_a_list():
    texts = [str(index) for index in range(10)]
    assert spread(texts, None) == spread(texts, 10) == spread(texts, 99) == texts
    assert spread(texts, 3) == ["0", "3", "6"]
