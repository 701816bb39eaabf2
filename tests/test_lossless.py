"""The float32 reference of an artifact: the checkpoint that it was made from, and no other."""

from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN

from cosyq.artifact.compare import differences
from cosyq.artifact.reader import open_artifact
from cosyq.errors import CheckpointError
from cosyq.lossless import lossless, lossless_recipe, recipe_against
from cosyq.recipe import find_recipe, load_recipe

MINI = ("source.path=null", "voices=[{name: default, bundled: clara}]")
FP32 = ("stages.llm.weights=fp32", "stages.flow.weights=fp32", "voices=[]")
CPU = torch.device("cpu")


def quiet(*_):
    pass


def test_minis_reference_is_mini_in_float32(artifact_of):
    packed = open_artifact(artifact_of("mini", *MINI))
    with lossless(recipe_against(packed.manifest), CPU, quiet) as reference:
        assert list(differences(open_artifact(artifact_of("mini", *MINI, *FP32)), reference, quiet)) == []
        assert {str(fmt) for fmt in reference.formats.values()} == {"fp32"}
        assert (reference.manifest.name, reference.manifest.bundled) == ("mini-fp32", "mini")
        assert not reference.voice_files()
        folder, digest = reference.folder, reference.manifest.digest
        assert folder.is_dir()
    assert not folder.exists()
    other = open_artifact(artifact_of("mini", *MINI, "stages.llm.weights=nf4", "name=else"))
    with lossless(recipe_against(other.manifest), CPU, quiet) as reference:
        assert reference.manifest.digest == digest  # what it says is kept for both


def test_a_recipes_reference_and_its_artifacts_are_the_same_weights(artifact_of):
    source = {"path": str(GOLDEN)}
    local = (f"source.path={GOLDEN}", "source.repo=null", "source.revision=null", "source.sha256={}", "voices=[]")
    recipe = load_recipe(find_recipe("nf4"), [*local, "stages.flow.steps=[4,10]"])
    packed = open_artifact(artifact_of("nf4", "stages.flow.steps=[4,10]"))
    with (
        lossless(lossless_recipe(recipe), CPU, quiet) as one,
        lossless(recipe_against(packed.manifest, source), CPU, quiet) as other,
    ):
        assert list(differences(one, other, quiet)) == []
        assert one.manifest.flow_steps == other.manifest.flow_steps == (4, 10)
        assert one.folder != other.folder


def test_another_checkpoint_is_refused_and_nothing_is_left(artifact_of, scratch_checkpoint, tmp_path):
    state = torch.load(scratch_checkpoint / "flow.pt", weights_only=True)
    next(iter(state.values())).mul_(1.001)
    torch.save(state, scratch_checkpoint / "flow.pt")
    recipe = recipe_against(open_artifact(artifact_of("int8")).manifest, {"path": str(scratch_checkpoint)})
    (tmp_path / "here").mkdir()
    with (
        pytest.raises(CheckpointError, match=r"flow\.pt: sha256 is"),
        lossless(recipe, CPU, quiet, beside=tmp_path / "here"),
    ):
        pass
    assert not list((tmp_path / "here").iterdir())


def test_an_artifact_that_does_not_say_where_it_came_from(artifact_of):
    with pytest.raises(ValueError, match="give one of repo"):
        recipe_against(open_artifact(artifact_of("int8")).manifest)


def test_the_encoders_are_no_part_of_it(artifact_of):
    """An artifact with voices from recordings was made from them too; a reference has no voices."""
    manifest = open_artifact(artifact_of("int8")).manifest
    files = manifest.source.files
    with_encoders = {**files, "campplus.onnx": "0" * 64}
    changed = replace(manifest, source=replace(manifest.source, files=with_encoders))
    place = {"path": str(GOLDEN)}
    assert recipe_against(changed, place) == recipe_against(manifest, place)
    assert recipe_against(manifest, place).source.sha256 == files
