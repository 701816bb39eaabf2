"""Weights that lie on the GPU before torch asks for them: `TRITON_INTERPRET=0 pytest -m gpu tests/gpu`."""

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
