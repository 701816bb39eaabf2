"""SEED-TTS-eval's lists: a small one of that layout is read and spoken, hostile ones are refused before anything."""

import json

import pytest
import soundfile
from conftest import MINI_SAYS, refused

from cosyq.cli.main import run
from cosyq.errors import UsageError
from cosyq.eval.seedtts import Prompts, read_list
from cosyq.recipe import bundled_checkpoint
from cosyq.voices.enrol import Encoders

SAYS = "Thank you very much."


@pytest.fixture
def data(tmp_path, mini_speech):
    """Of the published layout: a list, recordings beside it, ids that name both utterances."""
    folder = tmp_path / "seedtts_testset" / "en"
    (folder / "prompt-wavs").mkdir(parents=True)
    for name in ("common_voice_en_1", "common_voice_en_2"):
        soundfile.write(folder / "prompt-wavs" / f"{name}.wav", mini_speech, 24_000)
    lines = [
        f"common_voice_en_{n}-common_voice_en_9|{MINI_SAYS}|prompt-wavs/common_voice_en_{n}.wav|{SAYS}" for n in (1, 2)
    ]
    path = folder / "meta.lst"
    path.write_text("\n".join([lines[0] + "|wavs/common_voice_en_9.wav", "", lines[1]]) + "\n", "utf-8")
    return path


def test_a_list_is_read_as_it_is(data):
    first, second = read_list(data)
    assert first.utterance == "common_voice_en_1-common_voice_en_9"
    assert (first.transcript, first.text) == (MINI_SAYS, SAYS)
    assert first.prompt == data.parent / "prompt-wavs" / "common_voice_en_1.wav"
    assert second.prompt.name == "common_voice_en_2.wav"
    assert read_list(data, 1) == [first]
    data.write_bytes(b"\xef\xbb\xbf" + data.read_bytes().replace(b"\n", b"\r\n"))
    assert read_list(data) == [first, second]


GOOD = "a|words|a.wav|text\n"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "has 0 lines"),
        ("\n \n", "has 0 lines"),
        (GOOD + "a|words|a.wav\n", "line 2: has 3 columns"),
        ("a|b|c|d|e|f\n", "has 6 columns"),
        ("a|words|../a.wav|text\n", "no path inside"),
        ("a|words|sub/../../a.wav|text\n", "no path inside"),
        ("a|words|/etc/passwd|text\n", "no path inside"),
        ("a|words|C:\\a.wav|text\n", "no path inside"),
        ("a|words|..\\a.wav|text\n", "no path inside"),
        ("a|words||text\n", "no path inside"),
        ("a|words|a\0.wav|text\n", "no path inside"),
        ("a|words|a.wav|te\0xt\n", "no plain text"),
        ("a|words|a.wav|\n", "a text is empty"),
        ("../a|words|a.wav|text\n", "no utterance's name"),
        ("|words|a.wav|text\n", "no utterance's name"),
        ("a|words|a.wav|" + "x" * 5000 + "\n", "longer than 4096"),
        ("a|" + "x" * 5000 + "|a.wav|text\n", "longer than 4096"),
        (GOOD * 20_001, "has 20001 lines"),
        (b"a|words|a.wav|\xff\n", "not readable"),
        (b"a" * ((16 << 20) + 1), "no list"),
    ],
)
def test_hostile_lists_are_refused(tmp_path, content, part):
    path = tmp_path / "meta.lst"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=part) as caught:
        read_list(path)
    assert len(str(caught.value)) < 400


def test_a_list_that_is_missing_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match="not readable"):
            read_list(path)


def test_recordings_are_read_before_anything_is_spoken(data, mini):
    encoders, flow = Encoders(bundled_checkpoint("mini")), mini.artifact.manifest.model.flow
    prompts = Prompts(read_list(data), encoders, flow, lambda *_: None)
    assert len(prompts) == 2
    assert prompts[1].name == "common_voice_en_2-common_voice_en_9"
    assert prompts[1].transcript == MINI_SAYS
    assert prompts[1].prompt_tokens.numel() > 25
    (data.parent / "prompt-wavs" / "common_voice_en_2.wav").unlink()
    with pytest.raises(UsageError, match="no such audio file"):
        Prompts(read_list(data), encoders, flow, lambda *_: None)
    data.write_text(data.read_text().replace(MINI_SAYS, "Well. " * 60))
    with pytest.raises(UsageError, match="no transcript"):
        Prompts(read_list(data, 1), encoders, flow, lambda *_: None)


def test_the_command_scores_a_list_as_published(cli, mini_artifact, data, own_recognizer):
    """The mean of the utterances' rates, 4 of 1 word and 0 of 4; by words it would be 4 of 5."""
    data.write_text(data.read_text().replace(SAYS, "Hello!", 1))
    code, out, err = cli(
        "eval", mini_artifact, "--against", mini_artifact, "--device", "cpu", "--json",
        "--list", data, "--recognizer", own_recognizer("'Thank you, very much!'"),
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)["findings"]
    assert set(found) >= {"spoken.errors", "spoken.similarity", "spoken.truncated"}
    assert not any(key.startswith(("llm.", "flow.")) for key in found)
    assert found["spoken.errors"]["artifact"]["value"] == pytest.approx(100 * (4 + 0) / 2)
    assert found["spoken.similarity"]["artifact"]["value"] > 0.3
    assert found["spoken.errors"]["difference"]["value"] == 0


def test_a_list_and_texts_are_one_too_many(capsys, mini_artifact, data):
    code = run(["eval", str(mini_artifact), "--list", str(data), "--texts", str(data)])
    refused((code, *capsys.readouterr()), 2, "--texts, --list")
