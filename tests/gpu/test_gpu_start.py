"""Weights and kernels that are there before they are asked for: `TRITON_INTERPRET=0 pytest -m gpu tests/gpu`."""

import os
import subprocess
import sys
import weakref

import pytest
import torch

from cosyq.artifact import ahead, reader
from cosyq.artifact.names import HOST_TENSOR, STAGE_FILES
from cosyq.artifact.reader import load_stage, open_artifact
from cosyq.cli.main import run
from cosyq.kernels import start

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def tensors(network):
    packed = [t for m in network.modules() if hasattr(m, "packed") for t in m.packed.values()]
    return [*packed, *network.parameters()]


@pytest.mark.parametrize("recipe", ["int8", "nf4"])
def test_stages_that_were_read_ahead_are_the_same(recipe, tmp_path, monkeypatch):
    assert run(["checkpoint", "random", str(tmp_path / "checkpoint"), "--size", "small"]) == 0
    made = ["--source", str(tmp_path / "checkpoint"), "-o", str(tmp_path / "a"), "--device", "cuda"]
    assert run(["quantize", recipe, *made, "--set", "voices=[]"]) == 0
    artifact, used, taken = open_artifact(tmp_path / "a"), [], ahead.taken
    place = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "matmul": "dequantize"}
    plain = [load_stage(artifact, stage, **place) for stage in STAGE_FILES]

    def seen(path):
        there = taken(path)
        used.append(weakref.ref(there))
        return there

    monkeypatch.setattr(reader, "taken", seen)
    ahead.announce({artifact.folder / name: HOST_TENSOR.get(stage) for stage, name in STAGE_FILES.items()})
    start.begin_context("cuda", ahead.read).join(30)
    early = [load_stage(artifact, stage, **place) for stage in STAGE_FILES]
    assert len(used) == 3
    assert not any(there() for there in used), "they are free again"
    for a, b in zip(plain, early, strict=True):
        assert all(torch.equal(x, y) and x.device == y.device for x, y in zip(tensors(a), tensors(b), strict=True))


def test_a_second_process_needs_no_compiler(tmp_path):
    assert run(["checkpoint", "random", str(tmp_path / "checkpoint")]) == 0
    made = ["--source", str(tmp_path / "checkpoint"), "-o", str(tmp_path / "a"), "--device", "cuda"]
    assert run(["quantize", "int8", *made, "--set", "voices=[]"]) == 0
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TRITON_INTERPRET": "0"}

    def speak(name):
        script = "import sys; from cosyq.cli.main import run; run(sys.argv[1:]); print('triton' in sys.modules)"
        voice, out = str(tmp_path / "checkpoint" / "voice.safetensors"), str(tmp_path / name)
        asked = ["synth", "One, two.", "-a", str(tmp_path / "a"), "-v", voice, "-o", out, "--seed", "1"]
        command = [sys.executable, "-c", script, *asked, "--engine", "fused"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return (tmp_path / name).read_bytes(), done.stdout.split()[-1], "compiling" in done.stderr

    sound, *about = speak("first.wav")
    assert about == ["True", True]
    assert [*(tmp_path / "cache").rglob("*.kernel")]
    assert speak("second.wav") == (sound, "False", False)
