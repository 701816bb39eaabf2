"""From a recording to a voice, with stand-ins for the two encoders that have the real ones' interface."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import GOLDEN

from cosyq.artifact.reader import open_artifact
from cosyq.audio.recording import read_recording
from cosyq.audit import verify_artifact
from cosyq.cli.main import run
from cosyq.errors import CheckpointError, UsageError
from cosyq.voices.enrol import Encoders, enrol
from cosyq.voices.voice import load_voice

AUDIO = GOLDEN.parent / "audio"
ZERO_SHOT = AUDIO / "zero_shot_prompt.wav"
TRANSCRIPT = "希望你以后能够做的比我还好呦。"


@pytest.fixture(scope="module")
def flow_config(artifact_of):
    return open_artifact(artifact_of("int8")).manifest.model.flow


@pytest.mark.parametrize(("name", "seconds"), [("zero_shot_prompt", 3.48), ("cross_lingual_prompt", 13.75)])
def test_a_recording_becomes_a_voice(encoders_folder, flow_config, name, seconds):
    voice = enrol("me", read_recording(AUDIO / f"{name}.wav"), "", Encoders(encoders_folder), flow_config)
    tokens = voice.prompt_tokens.numel()
    assert tokens == pytest.approx(25 * seconds, abs=1)
    assert voice.prompt_mel.shape == (2 * tokens, 80)
    assert voice.speaker.shape == (192,)
    assert -13 < voice.prompt_mel.mean() < 0
    assert len(voice.to_bytes()) < 300_000


def test_rate_and_channels_change_little(encoders_folder, flow_config, tmp_path):
    """The same speech at 48 kHz in stereo and as an ogg: the mel a listener would take for the same."""
    original = read_recording(ZERO_SHOT)
    wide = np.stack([original.at(48_000)] * 2, axis=1)
    soundfile.write(tmp_path / "wide.wav", wide, 48_000)
    soundfile.write(tmp_path / "small.ogg", original.samples, original.rate)
    encoders = Encoders(encoders_folder)
    first = enrol("a", original, TRANSCRIPT, encoders, flow_config)
    for name, bound in (("wide.wav", 0.02), ("small.ogg", 0.3)):
        other = enrol("a", read_recording(tmp_path / name), TRANSCRIPT, encoders, flow_config)
        frames = min(len(first.prompt_mel), len(other.prompt_mel))
        assert abs(len(first.prompt_mel) - len(other.prompt_mel)) <= 2
        difference = (first.prompt_mel[:frames, :60] - other.prompt_mel[:frames, :60]).abs().mean()  # below 8 kHz
        assert difference < bound


BAD = {
    "short": (lambda: np.full(8_000, 0.1), 16_000, "only 0.50 seconds long"),
    "long": (lambda: np.random.default_rng(0).uniform(-0.5, 0.5, 31 * 16_000), 16_000, "longer than 30 seconds"),
    "silent": (lambda: np.zeros(32_000), 16_000, "is silent"),
    "clipped": (lambda: np.sign(np.sin(np.arange(32_000))), 16_000, "is clipped; record it again"),
    "slow rate": (lambda: np.full(8_000, 0.1), 4_000, "1 channels at 4000 Hz"),
    "too many channels": (lambda: np.full((32_000, 9), 0.1), 16_000, "9 channels"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_recordings(tmp_path, case):
    make, rate, message = BAD[case]
    soundfile.write(tmp_path / "x.wav", make(), rate)
    with pytest.raises(UsageError, match=message):
        read_recording(tmp_path / "x.wav")


def test_what_is_no_audio(tmp_path):
    whole = ZERO_SHOT.read_bytes()
    for name, content in {
        "x.wav": b"hello",
        "empty.wav": b"",
        "x.m4a": b"\0\0\0\x1cftypM4A \0\0\2\0M4A isomiso2" + bytes(5000),
        "x.raw": whole,  # a name that says: no header
        "x.flac": b"fLaC" + whole[:4000],
        "x.ogg": b"OggS" + whole[:4000],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=r"not readable as audio .* make one with `ffmpeg -i FILE out\.wav`"):
            read_recording(tmp_path / name)
    for path in (tmp_path, Path("a" * 5000), Path("a\0b")):
        with pytest.raises(UsageError, match="no such audio file"):
            read_recording(path)
    with pytest.raises(UsageError, match="no such audio file"):
        read_recording(tmp_path / "none.wav")


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "ogg"])
@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (44_100, 2), (48_000, 2)])
def test_what_phones_record(tmp_path, kind, rate, channels):
    """Every kind, mono and stereo: the same speech, in length and at most a little distorted."""
    original = read_recording(ZERO_SHOT)
    soundfile.write(tmp_path / f"x.{kind}", np.stack([original.at(rate)] * channels, axis=1), rate)
    shutil.copy(tmp_path / f"x.{kind}", tmp_path / "no-suffix")  # as a file in the cache
    for name in (f"x.{kind}", "no-suffix"):
        found = read_recording(tmp_path / name)
        assert found.rate == rate
        assert found.seconds == pytest.approx(original.seconds, abs=0.06)  # an mp3 is padded to whole frames
        samples, expected = found.at(8_000), original.at(8_000)
        count = min(len(samples), len(expected))
        assert np.corrcoef(samples[:count], expected[:count])[0, 1] > 0.95


PEAK = """
import sys, resource, numpy, soundfile
from pathlib import Path
from cosyq.audio.recording import read_recording
from cosyq.errors import UsageError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_recording(Path(sys.argv[1]))
except UsageError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


def wav_header(frames, rate, channels):
    size = min(frames * channels * 2, 0xFFFFFFF0)
    return b"RIFF" + struct.pack(
        "<I8sIHHIIHH4sI", size, b"WAVEfmt ", 16, 1, channels, rate, rate * channels * 2, channels * 2, 16, b"data", size
    )


@pytest.mark.parametrize(("rate", "channels", "megabytes"), [(16_000, 1, 16), (384_000, 8, 160)])
def test_ten_hours_take_bounded_memory(tmp_path, rate, channels, megabytes):
    """A file of ten hours, all but its header a hole. Thirty seconds in mono are 2 MB and 46 MB."""
    frames = 10 * 3600 * rate
    with (tmp_path / "x.wav").open("wb") as file:
        file.write(wav_header(frames, rate, channels))
        file.truncate(44 + min(frames * channels * 2, 0xFFFFFFF0))
    command = [sys.executable, "-c", PEAK, str(tmp_path / "x.wav")]
    kilobytes, said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(" ", 1)
    assert "longer than 30 seconds; cut out a clean passage" in said
    assert int(kilobytes) < megabytes * 1000


def test_a_forged_header_costs_nothing(tmp_path):
    """A few bytes that claim hours, and a real hour of flac silence: at most thirty seconds are decoded."""
    good = (AUDIO / "zero_shot_prompt.wav").read_bytes()
    at = good.index(b"data") + 4
    (tmp_path / "x.wav").write_bytes(good[:at] + (0x7FFFFFF0).to_bytes(4, "little") + good[at + 4 : at + 4000])
    with pytest.raises(UsageError):
        read_recording(tmp_path / "x.wav")
    hour = np.zeros(3600 * 8000, np.int16)
    with soundfile.SoundFile(tmp_path / "x.flac", "w", 8000, 1) as file:
        file.write(hour)
    with pytest.raises(UsageError, match="longer than 30 seconds"):
        read_recording(tmp_path / "x.flac")


def test_transcripts_and_names(encoders_folder, flow_config):
    recording, encoders = read_recording(ZERO_SHOT), Encoders(encoders_folder)
    for transcript in ("a", "far too much for three seconds of speech " * 10):
        with pytest.raises(UsageError, match=r"no transcript of 3\.5 seconds"):
            enrol("me", recording, transcript, encoders, flow_config)
    with pytest.raises(UsageError, match="60 characters are no transcript"):  # of English they could be
        enrol("me", recording, TRANSCRIPT * 4, encoders, flow_config)
    for transcript in (TRANSCRIPT, TRANSCRIPT * 2, "As much English as one says in three and a half seconds, quickly."):
        assert enrol("me", recording, f" {transcript}\n", encoders, flow_config).transcript == transcript
    with pytest.raises(UsageError, match="no transcript"):
        enrol("me", recording, "... --- ...", encoders, flow_config)
    for name in ("", "../me", "me/you", ".hidden", "a" * 101, "me\n"):
        with pytest.raises(UsageError, match="a voice's name"):
            enrol(name, recording, "", encoders, flow_config)


def test_encoders_that_are_not(encoders_folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"speech_tokenizer_v3\.onnx: missing"):
        Encoders(tmp_path)
    for name in ("speech_tokenizer_v3.onnx", "campplus.onnx"):
        (tmp_path / name).write_bytes((encoders_folder / "campplus.onnx").read_bytes())
    with pytest.raises(CheckpointError, match="takes 1 inputs, expected 2"):
        Encoders(tmp_path)
    (tmp_path / "speech_tokenizer_v3.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="not a usable ONNX file"):
        Encoders(tmp_path)


def test_the_commands(scratch_artifact, encoders_folder, tmp_path, capsys):
    def cli(*arguments):
        code = run([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else None, err

    where = ("-a", scratch_artifact)
    added = ("voice", "add", "me", "--audio", ZERO_SHOT, "--transcript", TRANSCRIPT, *where)
    assert cli(*added)[0] == 3  # a local checkpoint: where are the encoders?
    code, about, _ = cli(*added, "--source", encoders_folder)
    assert (code, about["prompt_tokens"], about["transcript"]) == (0, 87, TRANSCRIPT)
    verify_artifact(open_artifact(scratch_artifact))
    assert "voices/me.safetensors" in open_artifact(scratch_artifact).manifest.files
    code, _, err = cli(*added, "--source", encoders_folder)
    assert code == 2
    assert "there is such a voice already" in err
    assert cli(*added, "--source", encoders_folder, "--force")[0] == 0
    assert [v["name"] for v in cli("voice", "list", *where)[1]["voices"]] == ["me"]
    assert cli("voice", "show", "me", *where)[1]["prompt_seconds"] == pytest.approx(3.48)
    code, report, _ = cli("synth", "hello", *where, "-v", "me", "-o", tmp_path / "x.wav", "--device", "cpu")
    assert code == 0
    assert report["audio_seconds"] > 0
    assert cli("voice", "export", "me", *where, "-o", tmp_path / "me.safetensors")[0] == 0
    exported = load_voice(tmp_path / "me.safetensors", open_artifact(scratch_artifact).manifest.model.flow)
    assert torch.equal(exported.prompt_tokens, open_voice(scratch_artifact).prompt_tokens)
    assert cli("voice", "remove", "me", *where)[0] == 0
    assert cli("voice", "remove", "me", *where)[0] == 2
    assert open_artifact(scratch_artifact).voice_files() == {}
    verify_artifact(open_artifact(scratch_artifact))
    assert sorted(p.name for p in scratch_artifact.iterdir()) == sorted(
        [
            "flow.safetensors",
            "llm.safetensors",
            "manifest.json",
            "recipe.yaml",
            "tokenizer.json",
            "vocoder.safetensors",
            "voices",
        ]
    )


def test_a_one_off_voice_and_conversion(scratch_artifact, encoders_folder, tmp_path, capsys):
    def cli(*arguments):
        code = run([*map(str, arguments), "-a", str(scratch_artifact), "--device", "cpu", "--json"])
        return code, capsys.readouterr()

    prompt = ("--prompt-audio", ZERO_SHOT, "--prompt-text", TRANSCRIPT, "--source", encoders_folder)
    code, _ = cli("synth", "hello", *prompt, "-o", tmp_path / "x.wav", "--seed", "1")
    assert code == 0
    code, shown = cli("synth", "hello", *prompt, "-v", "me", "-o", tmp_path / "y.wav")
    assert (code, "not both" in shown.err) == (2, True)
    code, shown = cli("convert", ZERO_SHOT, "-o", tmp_path / "z.wav", "--source", encoders_folder)
    assert code == 0
    assert json.loads(shown.out)["audio_seconds"] == pytest.approx(3.48, abs=0.05)  # the length of what was said
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".wav") == ["x.wav", "z.wav"]


def open_voice(artifact):
    opened = open_artifact(artifact)
    return load_voice(opened.voice_files()["me"], opened.manifest.model.flow)
