"""cosyq eval as a user meets it: the table, its JSON, what is kept between runs, and what is refused."""

import json
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN, REPOSITORY, make_artifact, refused
from rich.progress import Progress

from cosyq.artifact.edit import put_voice
from cosyq.artifact.reader import open_artifact
from cosyq.eval import metrics, run
from cosyq.eval.metric import Series
from cosyq.eval.sentences import sentences, spread
from cosyq.eval.spoken import Aloud, Judges
from cosyq.eval.stages import Arithmetic
from cosyq.random_model import SMALL, write_random
from cosyq.sequences import Spoken, artifact_voices

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
    assert report.keys() == {"artifact", "against", "about", "judges", "findings", "bytes", "peak_memory_bytes"}
    assert report["bytes"] == sum(
        p.stat().st_size for p in artifact_of("nf4").rglob("*.*") if p.name != "manifest.json"
    )
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
    for _, artifact, reference, difference, items, needed in rows.values():
        assert (items, needed[:2]) == ("1", "? ")
        if reference:
            assert (artifact.split()[0], difference) == (reference, "0 [0, 0]")
        else:
            assert artifact == "0 [0, 0]"
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


def test_on_a_terminal_one_bar_follows_the_other(cli, artifact_of, texts, monkeypatch):
    """Two at once cannot be drawn, and end the command."""
    update = Progress.update  # drawn ten times a second, but a stage may be over sooner
    monkeypatch.setattr(Progress, "update", lambda self, *a, **k: update(self, *a, **k, refresh=True))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, _, err = cli("eval", artifact_of("int8"), "--against", GOLDEN, "--texts", texts, "--limit", "1", *CPU)
    assert code == 0, err
    found = [err.find(what) for what in ("reading the checkpoint", "measuring language model", "measuring vocoder")]
    assert -1 < found[0] < found[1] < found[2]


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


def test_what_was_said_is_kept_for_all_that_decides_it(artifact_of, voice, kept, monkeypatch):
    artifact, other = (open_artifact(artifact_of(recipe)) for recipe in ("int8", "nf4"))
    spoken = []

    def speak(reference, texts, voices, **_):
        spoken.append(texts)
        return [Spoken(text, voices[0].name, 0, (1,) * 20, "stop") for text in texts]

    monkeypatch.setattr(run, "speak", speak)
    monkeypatch.setattr(run, "load", lambda *_, **__: None)

    def listen(reference=artifact, texts=("hello",), voice=voice, seed=0, **keywords):
        arithmetic = Arithmetic(torch.device("cpu"))
        heard = run.listen(
            artifact, reference, texts, [voice], seed=seed, arithmetic=arithmetic, progress=lambda *_: None, **keywords
        )
        assert [item.spoken.text for item in heard] == list(texts)
        return len(spoken)

    assert (listen(), listen()) == (1, 1)
    assert listen(reference=other) == 2
    assert listen(texts=("one two",)) == 3
    assert listen(voice=replace(voice, transcript="hello")) == 4
    assert listen(seed=1) == 5
    assert listen() == 5
    assert len(list(kept.iterdir())) == 5
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, by the specification
    monkeypatch.setenv("HOME", str(kept.parent))
    assert (listen(), listen()) == (6, 6)
    assert len(list((kept.parent / ".cache" / "cosyq" / "sequences").iterdir())) == 1


def test_a_spoken_half_adds_what_it_found(artifact_of, tmp_path, monkeypatch):
    artifact, reference = (open_artifact(artifact_of(recipe)) for recipe in ("nf4", "fp32"))
    voices = artifact_voices(artifact, 1)
    wanted = Aloud(["hello"], voices, Judges())

    def both(mine, other, aloud, *, seed, progress):
        assert (mine().artifact, other().artifact) == (artifact, reference)
        assert (aloud, seed) == (wanted, 0)
        return [Series.of_means(metrics.MOS, [3.0, 3.0], [3.5, 4.0])], ("spoken",)

    monkeypatch.setattr(run, "speak_both", both)
    found = run.evaluate(
        artifact,
        reference,
        ["hello"],
        voices,
        seed=0,
        arithmetic=Arithmetic(torch.device("cpu")),
        progress=lambda *_: None,
        sequences=tmp_path / "said.json",
        aloud=wanted,
    )
    assert found.findings[-1].metric is metrics.MOS
    assert found.findings[-1].difference.value == -0.75
    assert found.findings[0].metric is metrics.KL
    assert (len(found.exact), found.spoken) == (1, ("spoken",))
    stages = ("llm.safetensors", "flow.safetensors", "vocoder.safetensors")
    assert found.files == {name: artifact.manifest.files[name].sha256 for name in stages}
    assert ("llm.head", "int8", 6761 * 64 + 6761 * 4 + 1) in [row[:3] for row in found.modules]
    assert found.sample_rate == 24_000


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
