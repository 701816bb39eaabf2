"""The promises of packing at full size: run with `make test-slow`, with a GPU where there is one."""

import bitsandbytes.functional as bnb
import pytest
import torch
from conftest import make_artifact

from cosyq.artifact.reader import StageFile, open_artifact, unpacked
from cosyq.checkpoint.reader import open_checkpoint, open_stage
from cosyq.model.inventory import STAGES
from cosyq.quantize.pack import pack
from cosyq.random_model import FULL, write_random

pytestmark = pytest.mark.slow
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIMITS = {"int8": 800e6, "nf4": 530e6, "fp4": 530e6}  # bytes of the folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full") / "checkpoint"
    write_random(folder, FULL, 0)
    return folder


def theirs(fmt, stored, shape):
    """bitsandbytes' own dequantization of the stored tensors."""
    placed = {name: tensor.to(DEVICE) for name, tensor in stored.items()}
    if fmt.name == "int8":
        return bnb.int8_vectorwise_dequant(placed["weight"], placed["SCB"]).cpu()
    parts = {name.removeprefix("weight."): t for name, t in placed.items() if name.startswith("weight.")}
    return bnb.dequantize_4bit(placed["weight"], bnb.QuantState.from_dict(parts, DEVICE)).view(shape).cpu()


@pytest.mark.parametrize("name", LIMITS)
def test_a_full_size_artifact_reloads_bit_for_bit(checkpoint, tmp_path, name):
    recipe, changes = ("nf4", ("stages.llm.weights=fp4", "stages.flow.weights=fp4")) if name == "fp4" else (name, ())
    artifact = open_artifact(make_artifact(tmp_path / name, recipe, *changes, source=checkpoint, device=DEVICE))
    assert sum(p.stat().st_size for p in artifact.folder.rglob("*") if p.is_file()) <= LIMITS[name]
    opened = open_checkpoint(checkpoint)
    compared = 0
    for stage in STAGES:
        source, file = open_stage(opened, stage, steps=(10,)), StageFile(artifact, stage)
        for module in artifact.modules(stage):
            fmt = artifact.formats[module.name]
            if fmt.is_float:
                continue
            stored = file.read(module)
            for key, tensor in pack(source.read(module, "weight"), fmt, DEVICE)[0].items():
                assert torch.equal(stored[key], tensor), f"{module.name} {key}"
            shape = module.parameters["weight"]
            assert torch.equal(unpacked(artifact, file, module)["weight"], theirs(fmt, stored, shape)), module.name
            compared += 1
    assert compared == 24 * 7 + 3 + 22 * 6  # every linear of both transformers, the head, two embeddings
