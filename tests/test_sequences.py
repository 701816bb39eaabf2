"""What the reference spoke, kept and shown again: round trips, and files that are refused."""

import json
from dataclasses import replace

import pytest

from cosyq.artifact.reader import open_artifact
from cosyq.errors import ArtifactError, UsageError
from cosyq.runtime.request import Requests
from cosyq.runtime.synthesizer import load
from cosyq.sequences import Spoken, read_spoken, shown, speak, write_spoken

LINE = Spoken("hello world", "golden", 7, (1, 2, 3, 4, 5, 6), "stop")


def quiet(*_):
    pass


def test_what_is_spoken_is_what_synthesis_speaks(artifact_of, voice):
    """Ids of the same seed, texts in the voices' turns; the two sentences of a long text as two."""
    tts = load(open_artifact(artifact_of("int8")), device="cpu")
    other = replace(voice, name="other", transcript="")
    said = []
    found = speak(
        tts, ["hello", "one two"], [voice, other], seed=3, progress=lambda what, i, n: said.append((what, i, n))
    )
    assert said == [("speaking", 0, 2), ("speaking", 1, 2)]
    assert [(item.text, item.voice, item.seed) for item in found] == [("hello", "golden", 3), ("one two", "other", 4)]
    for item, spoken_by in zip(found, (voice, other), strict=True):
        audio = tts.synthesize(item.text, voice=spoken_by, seed=item.seed)
        assert (audio.timings.speech_tokens, audio.timings.finish) == (len(item.tokens), item.finish)
        (heard,) = shown(tts.requests, [item], [voice, other])
        assert len(audio.samples) == 960 * len(heard.audible)
    assert found[0].tokens != found[1].tokens[: len(found[0].tokens)]


def test_what_is_shown_is_what_was_spoken_to(artifact_of, voice):
    artifact = open_artifact(artifact_of("int8", "stages.flow.steps=[4,10]"))
    requests = Requests(artifact)
    silent = artifact.manifest.model.llm.silent_tokens[0]
    item = replace(LINE, tokens=(9, *[silent] * 8, 9), finish="length")
    (heard,) = shown(requests, [item], [voice], steps=10)
    (asked,) = requests.utterances(item.text, requests.manner({"voice": voice, "seed": 7}))
    assert (heard.spoken, heard.part, heard.voice, heard.manner.steps) == (item, asked.part, voice, 10)
    assert heard.audible == (9, *[silent] * 5, 9)


def test_kept_utterances_come_back(tmp_path):
    spoken = [LINE, replace(LINE, text="你好", finish="length")]
    write_spoken(tmp_path / "a.json", "made of this", spoken)
    assert read_spoken(tmp_path / "a.json", "made of this") == spoken
    with pytest.raises(ArtifactError, match=r"another model.*remove it"):
        read_spoken(tmp_path / "a.json", "made of that")
    with pytest.raises(ArtifactError, match="not kept utterances"):
        read_spoken(tmp_path / "b.json", "made of this")
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_spoken(tmp_path / "none" / "a.json", "made of this", spoken)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "damage",
    [
        {"text": 7},
        {"voice": None},
        {"seed": "7"},
        {"seed": True},
        {"tokens": "12"},
        {"tokens": [-1]},
        {"tokens": [1 << 20]},
        {"tokens": [True]},
        {"tokens": [1.5]},
        {"tokens": None},
        {"finish": "never"},
    ],
)
def test_a_damaged_utterance_is_refused(tmp_path, damage):
    write_spoken(tmp_path / "a.json", "made of this", [LINE])
    data = json.loads((tmp_path / "a.json").read_text())
    data["spoken"][0] |= damage
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=r"not kept utterances.*remove it"):
        read_spoken(tmp_path / "a.json", "made of this")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"origin": "x"}', '{"origin": "x", "spoken": 3}', "[" * 100_000])
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ArtifactError, match="not kept utterances"):
        read_spoken(tmp_path / "a.json", "x")


def test_a_large_file_is_refused_unread(tmp_path, monkeypatch):
    write_spoken(tmp_path / "a.json", "x", [LINE])
    monkeypatch.setattr("cosyq.sequences.MAX_BYTES", 20)
    with pytest.raises(ArtifactError, match="more than 20 bytes"):
        read_spoken(tmp_path / "a.json", "x")


def test_what_cannot_be_shown(artifact_of, voice):
    requests = Requests(open_artifact(artifact_of("int8")))
    with pytest.raises(UsageError, match=r"other: the artifact lacks a voice"):
        shown(requests, [replace(LINE, voice="other")], [voice])
    with pytest.raises(UsageError, match="several here"):
        shown(requests, [replace(LINE, text="hello world. " * 30)], [voice])
    with pytest.raises(UsageError, match="no table for so many"):
        shown(requests, [LINE], [voice], steps=3)
    end = requests.artifact.manifest.model.llm.speech_vocab
    for tokens, finish in (((), "length"), ((1,), "stop"), ((1,) * 4000, "length"), ((1, 2, 3, 4, 5, end), "stop")):
        with pytest.raises(ArtifactError, match=r"hello world.*not ids"):
            shown(requests, [replace(LINE, tokens=tokens, finish=finish)], [voice])
