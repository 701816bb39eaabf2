"""cosyq diff: what two artifacts hold differently, measured."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import make_artifact
from safetensors.torch import load_file

from cosyq.artifact.compare import Held, beside, differences, relative_error
from cosyq.artifact.edit import put_voice
from cosyq.artifact.reader import open_artifact
from cosyq.random_model import SMALL, write_random


def compared(first, second):
    return {d.module: d for d in differences(open_artifact(first), open_artifact(second), lambda *_: None)}


def test_nothing_differs(cli, artifact_of):
    assert compared(artifact_of("int8"), artifact_of("int8")) == {}
    code, out, _ = cli("diff", artifact_of("int8"), artifact_of("int8"), "--json")
    assert (code, json.loads(out)) == (0, {"same": True, "modules": [], "beside": {}})


@pytest.mark.parametrize("recipe", ["int8", "nf4", "bf16"])
def test_against_the_weights_as_they_were_the_error_is_the_recorded_one(artifact_of, recipe):
    packed = open_artifact(artifact_of(recipe))
    found = compared(artifact_of("fp32"), artifact_of(recipe))
    recorded = {m.name: m for m in packed.manifest.modules if m.rms_error > 0}
    assert found.keys() == recorded.keys()
    for name, difference in found.items():
        assert difference.error == pytest.approx(recorded[name].rms_error, rel=1e-4)
        assert difference.first.format == "fp32"
        assert difference.second == Held(str(recorded[name].format), recorded[name].bytes)


def test_one_changed_weight_is_one_module(artifact_of, scratch_checkpoint, tmp_path):
    state = torch.load(scratch_checkpoint / "llm.pt", weights_only=True)
    state["llm.model.model.layers.1.self_attn.q_proj.weight"] *= 1.25
    torch.save(state, scratch_checkpoint / "llm.pt")
    other = make_artifact(tmp_path / "a", "int8", source=scratch_checkpoint)
    (difference,) = compared(artifact_of("int8"), other).values()
    assert difference.module == "llm.layers.1.self_attn.q_proj"
    assert difference.first == difference.second
    assert difference.error == pytest.approx(0.25, rel=1e-3)
    first, second = (open_artifact(folder).manifest for folder in (artifact_of("int8"), other))
    assert beside(first, second) == {"source of llm.pt": (first.source.files["llm.pt"], second.source.files["llm.pt"])}


def test_other_models_and_other_values(artifact_of, tmp_path):
    write_random(tmp_path / "random", replace(SMALL, layers=4), seed=0)
    other = make_artifact(tmp_path / "b", "int8", source=tmp_path / "random")
    found = compared(artifact_of("int8"), other)
    embedding = found["llm.text_embedding"]
    assert (embedding.first.format, embedding.second.format, embedding.error) == ("int8", "int8", None)
    lonely = [d for d in found.values() if None in (d.first, d.second)]
    assert {d.module.rsplit(".", 1)[0] for d in lonely} >= {"llm.layers.3.mlp", "llm.layers.3.self_attn"}
    assert all(d.error is None and d.first is None for d in lonely)
    assert relative_error(torch.ones(3), torch.zeros(3)) == float("inf")
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0


def test_an_error_is_summed_in_parts(monkeypatch):
    monkeypatch.setattr("cosyq.artifact.compare.AT_ONCE", 7)
    source = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    assert relative_error(source * 1.5, source) == pytest.approx(0.5, rel=1e-6)


def test_the_command(cli, artifact_of, scratch_artifact, voice):
    code, out, err = cli("diff", artifact_of("int8"), artifact_of("nf4"), "--json")
    report = json.loads(out)
    assert (code, report["same"]) == (0, False)
    errors = [module["rms_error"] for module in report["modules"]]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.05
    assert report["beside"]["recipe"] == [
        open_artifact(artifact_of(recipe)).manifest.recipe_sha256 for recipe in ("int8", "nf4")
    ]
    put_voice(open_artifact(scratch_artifact), "golden", voice.to_bytes())
    code, out, err = cli("diff", artifact_of("int8"), scratch_artifact)
    sha256 = open_artifact(scratch_artifact).manifest.files["voices/golden.safetensors"].sha256
    assert (code, out) == (0, "")
    assert f"voices/golden.safetensors: none | {sha256}\n" in err
    assert "\n0 of " in err
    code, out, _ = cli("diff", artifact_of("nf4"), artifact_of("int8"))
    worst = out.splitlines()[0].split("\t")
    assert worst[1].startswith("nf4/")
    assert worst[3] == "int8"
    stage, _, name = worst[0].partition(".")
    assert f"{name}.SCB" in load_file(artifact_of("int8") / f"{stage}.safetensors")
