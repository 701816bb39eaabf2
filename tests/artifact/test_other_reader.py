"""docs/artifact.md is enough to read an artifact by: a reader of sixty lines, of json and safetensors alone, does."""

import hashlib
import json
import re
from pathlib import Path

import other_reader
import pytest
import torch
from conftest import GOLDEN, REPOSITORY, make_artifact
from test_artifact import RECIPES, resign

from cosyq.artifact.reader import StageFile, open_artifact, unpacked
from cosyq.model.inventory import STAGES

SPECIFICATION = (REPOSITORY / "docs" / "artifact.md").read_text("utf-8")


def test_it_is_small_and_needs_little():
    text = Path(other_reader.__file__).read_text()
    assert len(text.splitlines()) <= 60
    assert set(re.findall(r"^(?:import|from) (\w+)", text, re.M)) == {"hashlib", "json", "pathlib", "safetensors"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_reads_what_ours_reads(artifact_of, recipe):
    folder = artifact_of("nf4" if recipe == "fp4" else recipe, *RECIPES[recipe])
    artifact = open_artifact(folder)
    found = dict(other_reader.read_modules(folder))
    for stage in STAGES:
        file = StageFile(artifact, stage)
        for module in artifact.modules(stage):
            expected, read = unpacked(artifact, file, module), found.pop(module.name)
            assert read.keys() == expected.keys()
            for name, tensor in expected.items():
                assert read[name].dtype == tensor.dtype
                assert torch.equal(read[name], tensor), f"{module.name}.{name}"
    assert not found


def test_it_finds_damage(scratch_artifact):
    path = scratch_artifact / "flow.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AssertionError, match=r"flow\.safetensors"):
        other_reader.read_manifest(scratch_artifact)
    resign(scratch_artifact, lambda manifest: None)
    other_reader.read_manifest(scratch_artifact)
    text = (scratch_artifact / "manifest.json").read_text()
    (scratch_artifact / "manifest.json").write_text(text.replace('"device"', '"devise"'))
    with pytest.raises(AssertionError, match="the manifest was changed"):
        other_reader.read_manifest(scratch_artifact)


def test_the_specification_names_everything(artifact_of):
    """Every key of a manifest but the model's, which are those of `cosyq/model/config.py`, and every kind of tensor."""
    data = json.loads((artifact_of("nf4") / "manifest.json").read_text())
    keys = {*data, *data["source"], *data["modules"][0], *data["modules"][0]["format"]}
    keys |= {key for record in data["files"].values() for key in record} | set(data["model"])
    keys |= {key for module in data["modules"] for key in module["format"]}
    missing = {key for key in keys if f"`{key}`" not in SPECIFICATION}
    assert not missing
    kinds = {re.sub(r"(\.|conv)\d+(?=\.|$)", r"\1N", module["name"]) for module in data["modules"]}
    assert not {kind for kind in kinds if f"`{kind}`" not in SPECIFICATION}


def test_the_recipe_hashes_to_what_the_manifest_says(tmp_path, whole_checkpoint):
    """As the specification has it, with a transcript in Chinese."""
    audio = GOLDEN.parent / "audio" / "zero_shot_prompt.wav"
    voice = f"voices=[{{name: me, audio: {audio}, transcript: 希望你以后能够做的比我还好呦。}}]"
    manifest = other_reader.read_manifest(make_artifact(tmp_path / "a", "int8", voice, source=whole_checkpoint))
    assert manifest["recipe"]["voices"][0]["transcript"][0] == "希"
    text = json.dumps(manifest["recipe"], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    assert hashlib.sha256(text.encode()).hexdigest() == manifest["recipe_sha256"]
