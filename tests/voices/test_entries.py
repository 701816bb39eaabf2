"""A recipe's voices: recordings enrolled while an artifact is made, with stand-ins for the encoders."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import soundfile
import torch
from conftest import GOLDEN, make_artifact, refused

from cosyq import build
from cosyq.artifact.reader import open_artifact
from cosyq.audio.recording import read_recording
from cosyq.audit import verify_artifact
from cosyq.errors import ArtifactError, CheckpointError, NetworkError, RecipeError
from cosyq.recipe import find_recipe, load_recipe
from cosyq.voices.enrol import Encoders, enrol
from cosyq.voices.entries import pin
from cosyq.voices.voice import load_voice

ZERO_SHOT = GOLDEN.parent / "audio" / "zero_shot_prompt.wav"
SHA256 = "c7b31d6dbe7cc6a716dded00550db5b50940bf209e424e4ad207b12e657c8ff6"
TRANSCRIPT = "希望你以后能够做的比我还好呦。"


def voices(**entry):
    return "voices=" + json.dumps([{"name": "me", **{key: str(value) for key, value in entry.items()}}])


def recipe(*overrides):
    return load_recipe(find_recipe("int8"), list(overrides))


def content(artifact):
    return {str(p.relative_to(artifact)): p.read_bytes() for p in artifact.rglob("*") if p.is_file()}


def test_a_recording_is_enrolled(tmp_path, whole_checkpoint, encoders_folder):
    """The artifact has the voice that `voice add` would make, and says what it was made from."""
    change = voices(audio=ZERO_SHOT, transcript=TRANSCRIPT)
    artifact = open_artifact(make_artifact(tmp_path / "a", "int8", change, source=whole_checkpoint))
    verify_artifact(artifact)
    flow = artifact.manifest.model.flow
    found = load_voice(artifact.voice_files()["me"], flow)
    expected = enrol("me", read_recording(ZERO_SHOT), TRANSCRIPT, Encoders(encoders_folder), flow)
    assert found.to_bytes() == expected.to_bytes()
    assert artifact.manifest.recipe["voices"] == [{"name": "me", "transcript": TRANSCRIPT, "sha256": SHA256}]
    for name in ("campplus.onnx", "speech_tokenizer_v3.onnx"):
        digest = hashlib.sha256((encoders_folder / name).read_bytes()).hexdigest()
        assert artifact.manifest.source.files[name] == digest
    assert "onnxruntime" in artifact.manifest.versions


def test_the_bytes_do_not_tell_where_the_recording_was(tmp_path, whole_checkpoint):
    moved = shutil.copy(ZERO_SHOT, tmp_path / "elsewhere.wav")
    first, second = (
        make_artifact(tmp_path / name, "int8", voices(audio=audio, transcript=TRANSCRIPT), source=whole_checkpoint)
        for name, audio in (("a", ZERO_SHOT), ("b", moved))
    )
    assert content(first) == content(second)


def test_the_digest_is_of_what_was_recorded(tmp_path):
    one = voices(audio=ZERO_SHOT, transcript=TRANSCRIPT)
    other = tmp_path / "other.wav"
    samples, rate = soundfile.read(ZERO_SHOT)
    soundfile.write(other, samples * 0.9, rate)
    digests = [
        pin(recipe(change)).digest()
        for change in (
            one,
            voices(audio=ZERO_SHOT, transcript=TRANSCRIPT, name="you"),
            voices(audio=ZERO_SHOT, transcript=TRANSCRIPT[:-1]),
            voices(audio=other, transcript=TRANSCRIPT),
            "voices=[]",
        )
    ]
    assert len(set(digests)) == len(digests)
    assert pin(recipe(voices(audio=ZERO_SHOT, transcript=TRANSCRIPT, sha256=SHA256))).digest() == digests[0]


def test_a_ready_voice_needs_no_encoders(tmp_path, voice, monkeypatch):
    monkeypatch.setattr("cosyq.voices.entries.Encoders", None)
    ready = tmp_path / "me.safetensors"
    ready.write_bytes(voice.to_bytes())
    pin_of_absent = "source.sha256={campplus.onnx: '" + "0" * 64 + "'}"
    artifact = open_artifact(make_artifact(tmp_path / "a", "int8", voices(file=ready), pin_of_absent))
    assert (artifact.folder / "voices" / "me.safetensors").read_bytes() == voice.to_bytes()
    assert set(artifact.manifest.versions) == {"cosyq", "torch", "bitsandbytes"}
    assert "campplus.onnx" not in artifact.manifest.source.files
    with pytest.raises(RecipeError, match=r"voice me, .*me.safetensors: sha256 is .*, the recipe pins 0000"):
        pin(recipe(voices(file=ready, sha256="0" * 64)))
    with pytest.raises(ArtifactError, match=r"voice me, .*none.safetensors: no such voice file"):
        pin(recipe(voices(file=tmp_path / "none.safetensors")))


UNUSABLE = {
    "missing": ({"audio": "none.wav", "transcript": ""}, "voice me, none.wav: no such audio file"),
    "another": ({"audio": ZERO_SHOT, "transcript": "", "sha256": "0" * 64}, f"sha256 is {SHA256}, the recipe pins 0"),
    "no name": ({"file": "a" * 5000}, r"cannot be read \(File name too long\)"),
    "no audio": ({"audio": __file__, "transcript": ""}, "not readable as audio"),
    "transcript": ({"audio": ZERO_SHOT, "transcript": TRANSCRIPT * 4}, r"60 characters are no transcript of 3\.5 sec"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_will_not_do_is_said_before_anything_is_fetched(case, monkeypatch):
    monkeypatch.setattr("cosyq.hub.snapshot.fetch", None)  # the recipe's own source is the Hub
    entry, message = UNUSABLE[case]
    with pytest.raises(RecipeError, match=message):
        build.prepare(recipe(voices(**entry)), "")


def test_a_file_that_changes_under_the_build(tmp_path, whole_checkpoint):
    audio = tmp_path / "me.wav"
    shutil.copy(ZERO_SHOT, audio)
    local = [f"source.path={whole_checkpoint}", "source.repo=null", "source.revision=null", "source.sha256={}"]
    prepared = build.prepare(recipe(*local, voices(audio=audio, transcript="")), "")
    samples, rate = soundfile.read(ZERO_SHOT)
    soundfile.write(audio, samples * 0.9, rate)
    with pytest.raises(RecipeError, match=f"the recipe pins {SHA256}"):
        build.run(prepared, tmp_path / "a", torch.device("cpu"), force=False, progress=lambda *_: None)
    assert not (tmp_path / "a").exists()


def test_encoders_are_looked_for_before_the_work(tmp_path, whole_checkpoint, monkeypatch):
    monkeypatch.setattr("cosyq.build.pack", None)
    change = voices(audio=ZERO_SHOT, transcript=TRANSCRIPT)
    (whole_checkpoint / "campplus.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match=r"campplus\.onnx: not a usable ONNX file"):
        make_artifact(tmp_path / "a", "int8", change, source=whole_checkpoint)
    (whole_checkpoint / "campplus.onnx").unlink()
    local = [f"source.path={whole_checkpoint}", "source.repo=null", "source.revision=null"]
    with pytest.raises(CheckpointError, match=r"campplus\.onnx: missing; a voice cannot be made"):
        build.prepare(recipe(*local, change), "")
    assert not (tmp_path / "a").exists()


def test_pinned_encoders_must_be_those(tmp_path, whole_checkpoint):
    change = voices(audio=ZERO_SHOT, transcript=TRANSCRIPT)
    pins = "source.sha256={campplus.onnx: '" + "0" * 64 + "'}"
    with pytest.raises(CheckpointError, match=r"campplus\.onnx: sha256 is"):
        make_artifact(tmp_path / "a", "int8", pins, change, source=whole_checkpoint)
    assert not (tmp_path / "a").exists()


def test_a_remote_voice_that_cannot_be_had(monkeypatch, tmp_path):
    """Never left out in silence: the stock recipe stops, and says how to go on."""
    monkeypatch.setattr("huggingface_hub.cached_assets_path", lambda *_: tmp_path)
    with pytest.raises(NetworkError) as caught:
        build.prepare(recipe("source.path=.", "source.repo=null", "source.revision=null"), "")
    assert caught.value.where.startswith("voice default, https://raw.githubusercontent.com/FunAudioLLM/CosyVoice/")
    assert caught.value.remedy.endswith("--set voices.N.audio=FILE, or build without voices: --set voices=[]")


def test_a_remote_recording_is_fetched_once_and_enrolled(web, cache, cli, offline, tmp_path, whole_checkpoint):
    """From the command line, over TLS, in a process of its own; the second time from the cache, and then not at all."""
    web.pages["/me.wav"] = ZERO_SHOT.read_bytes()

    def command(output, *changes):
        address = f"voices.0.audio={web.address}/me.wav"
        source = ("--source", str(whole_checkpoint), "--set", address)
        return ["quantize", "int8", *source, *changes, "-o", str(output), "--device", "cpu"]

    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(cache)}
    alone = [sys.executable, "-m", "cosyq", *command(tmp_path / "a")]
    done = subprocess.run(alone, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    artifact = open_artifact(tmp_path / "a")
    assert load_voice(artifact.voice_files()["default"], artifact.manifest.model.flow).transcript == TRANSCRIPT
    assert artifact.manifest.recipe["voices"][0]["sha256"] == SHA256
    assert cli(*command(tmp_path / "b"))[0] == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert web.asked == ["/me.wav"]
    shutil.rmtree(cache)
    pinned = command(tmp_path / "c", "--set", f"voices.0.sha256={'f' * 64}")
    refused(cli(*pinned), 5, f"sha256 is {SHA256}, the recipe pins ffff")
    offline()
    refused(cli(*command(tmp_path / "c")), 5, "HF_HUB_OFFLINE is set; name a local copy")
    assert not (tmp_path / "c").exists()
    assert cli(*command(tmp_path / "c", "--set", "voices=[]"))[0] == 0
    assert not open_artifact(tmp_path / "c").voice_files()
