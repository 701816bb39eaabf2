"""From a recording to a voice, with stand-ins for the two encoders that have the real ones' interface."""

import json

import numpy as np
import onnx
import pytest
import soundfile
import torch
from conftest import GOLDEN
from onnx import TensorProto, helper

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


def stand_in(folder):
    """speech_tokenizer_v3.onnx: [1, 128, T], [1] -> [1, ceil(T / 4)]; campplus.onnx: [1, T, 80] -> [1, 192]."""
    folder.mkdir()
    number = helper.make_tensor

    def save(name, nodes, inputs, output, constants):
        graph = helper.make_graph(nodes, name, inputs, [output], constants)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / name)

    value = helper.make_tensor_value_info
    save(
        "speech_tokenizer_v3.onnx",
        [
            helper.make_node("ReduceMean", ["feats"], ["mean"], axes=[1], keepdims=0),
            helper.make_node("Slice", ["mean", "zero", "end", "axis", "four"], ["kept"]),
            helper.make_node("Mul", ["kept", "scale"], ["scaled"]),
            helper.make_node("Abs", ["scaled"], ["positive"]),
            helper.make_node("Cast", ["positive"], ["whole"], to=TensorProto.INT64),
            helper.make_node("Mod", ["whole", "codes"], ["indices"]),
        ],
        [value("feats", TensorProto.FLOAT, [1, 128, "T"]), value("feats_length", TensorProto.INT32, [1])],
        value("indices", TensorProto.INT64, [1, "N"]),
        [
            number("zero", TensorProto.INT64, [1], [0]),
            number("end", TensorProto.INT64, [1], [1 << 40]),
            number("axis", TensorProto.INT64, [1], [1]),
            number("four", TensorProto.INT64, [1], [4]),
            number("scale", TensorProto.FLOAT, [1], [1e4]),
            number("codes", TensorProto.INT64, [1], [6561]),
        ],
    )
    mix = np.random.default_rng(0).standard_normal((80, 192)).astype(np.float32)
    save(
        "campplus.onnx",
        [
            helper.make_node("Abs", ["input"], ["size"]),
            helper.make_node("ReduceMean", ["size"], ["mean"], axes=[1], keepdims=0),
            helper.make_node("MatMul", ["mean", "mix"], ["output"]),
        ],
        [value("input", TensorProto.FLOAT, [1, "T", 80])],
        value("output", TensorProto.FLOAT, [1, 192]),
        [number("mix", TensorProto.FLOAT, [80, 192], mix.ravel())],
    )
    return folder


@pytest.fixture(scope="module")
def encoders_folder(tmp_path_factory):
    return stand_in(tmp_path_factory.mktemp("onnx") / "encoders")


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
    (tmp_path / "x.wav").write_text("hello")
    with pytest.raises(UsageError, match="not readable as audio"):
        read_recording(tmp_path / "x.wav")
    with pytest.raises(UsageError, match="no such audio file"):
        read_recording(tmp_path / "none.wav")


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
