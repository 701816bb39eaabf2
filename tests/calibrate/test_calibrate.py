"""Calibrated recipes, from the file to an artifact that speaks."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN

from cosyq import build
from cosyq.artifact.manifest import Manifest
from cosyq.artifact.reader import load_stage, open_artifact, text_rows
from cosyq.calibrate import run
from cosyq.calibrate.flow import flow_moments
from cosyq.calibrate.llm import llm_moments
from cosyq.calibrate.moments import Moments
from cosyq.calibrate.sentences import sentences
from cosyq.cli.main import run as command
from cosyq.errors import CheckpointError, RecipeError
from cosyq.eval.distances import log_spectral
from cosyq.eval.sentences import sentences as measured_with
from cosyq.eval.stages import mels
from cosyq.lossless import lossless_recipe
from cosyq.model.flow import time_steps
from cosyq.quantize.calibrated import Calibrated
from cosyq.recipe import find_recipe, load_recipe
from cosyq.runtime.synthesizer import load
from cosyq.sequences import artifact_voices, shown, speak
from cosyq.voices.entries import enrol as entries_enrol

CPU = torch.device("cpu")
WANTED = ("stages.llm.calibrate={sequences: 3}", "stages.flow.calibrate={sequences: 1}")


def quiet(*_):
    pass


def test_it_is_measured_with_other_sentences():
    for language in ("en", "zh"):
        mine = sentences([language], 200)
        assert len(set(mine)) == 200  # in halves, long before a sentence comes again
        assert not set(mine) & set(measured_with(language))
    both = sentences(["en", "zh"], 4)
    assert both[::2] == sentences(["en"], 2)
    assert both[1::2] == sentences(["zh"], 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.llm={weights: bf16, calibrate: {sequences: 4}}", "calibrate is an option of int8, nf4 and fp4"),
        ("stages.flow.calibrate={sequences: 0}", "greater than or equal to 1"),
        ("stages.flow.calibrate={}", "sequences: missing"),
        ("stages.flow.calibrate={sequences: 4, damping: 1}", "unknown key, valid here: sequences"),
        ("stages.vocoder={weights: fp16, calibrate: {sequences: 4}}", "unknown key"),
        ("rules=[{match: llm.head, weights: nf4, calibrate: {sequences: 4}}]", "unknown key"),
    ],
)
def test_recipes_say_it_of_packed_stages_alone(change, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(find_recipe("mini-nf4"), [change])


def test_the_digest_knows_of_calibration():
    plain, wanted = (load_recipe(find_recipe("mini-nf4"), list(more)) for more in ((), WANTED))
    assert plain.digest() != wanted.digest()
    assert "calibrate" not in json.dumps(plain.resolved())
    assert wanted.resolved()["stages"]["llm"]["calibrate"] == {"sequences": 3}


@pytest.fixture(scope="module")
def heard(artifact_of):
    """The golden checkpoint in float32, and what it said."""
    artifact = open_artifact(artifact_of("fp32"))
    return artifact, run._speak(artifact, 2, CPU, quiet)


def network(artifact, stage):
    return load_stage(artifact, stage, device=CPU, dtype=torch.float32, matmul="dequantize")


def test_the_flows_inputs_count_by_guidance_and_step(heard):
    artifact, said = heard
    flow = network(artifact, "flow")
    path, seen = "estimator.blocks.1.ff.up", []
    handle = flow.get_submodule(path).register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    moment = flow_moments(flow, said[:1], [path], quiet).of(path)
    handle.remove()
    expected = torch.zeros_like(moment)
    for inputs, size in zip(seen, time_steps(10)[1], strict=True):
        for branch, share in zip(inputs, (1.7, 0.7), strict=True):
            expected += (size * share) ** 2 * branch.T @ branch
    torch.testing.assert_close(moment, expected / expected.diagonal().mean(), rtol=1e-4, atol=1e-4)


def test_the_language_models_inputs_count_by_their_gradient(heard):
    """The head's is known: what an id was given less what it is, over all ids."""
    artifact, said = heard
    model, rows = network(artifact, "llm"), text_rows(artifact)
    model.head.weight.data *= 40  # some ids become likely, so that steps count differently
    seen = []
    handle = model.head.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    moments = llm_moments(model, rows, said[:1], ["head", "layers.0.mlp.down_proj"], quiet)
    handle.remove()
    hidden, spoken = seen[0], torch.tensor(said[0].spoken.tokens)
    gradient = model.head(hidden).softmax(-1)[: len(spoken)]
    gradient[torch.arange(len(spoken)), spoken] -= 1
    weights = gradient.square().mean(1, keepdim=True)
    expected = (hidden[: len(spoken)] * weights).T @ hidden[: len(spoken)]
    found = moments.of("head")
    torch.testing.assert_close(found, expected / expected.diagonal().mean(), rtol=1e-3, atol=1e-3)
    assert torch.linalg.eigvalsh(moments.of("layers.0.mlp.down_proj").double()).min() > -1e-4


def test_a_layer_that_is_given_nothing_has_no_moment():
    moments = Moments(["one"])
    with pytest.raises(ValueError, match="never used"):
        moments.of("one")
    moments.add("one", torch.zeros(2, 3), torch.ones(2, 1))
    assert moments.of("one").abs().max() == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory, artifact_of):
    """The golden checkpoint's nf4 artifact, calibrated."""
    folder = tmp_path_factory.mktemp("calibrated") / "artifact"
    changes = ["source.repo=null", "source.revision=null", "source.sha256={}", "voices=[]", f"source.path={GOLDEN}"]
    sets = [part for change in (*changes, *WANTED) for part in ("--set", change)]
    assert command(["quantize", "nf4", "--device", "cpu", "-o", str(folder), *sets]) == 0
    return open_artifact(folder), open_artifact(artifact_of("nf4"))


def test_a_calibrated_artifact_is_as_large_and_speaks(made):
    calibrated, plain = (side.manifest for side in made)
    assert [record.bytes for record in calibrated.modules] == [record.bytes for record in plain.modules]
    for name, record in calibrated.files.items():
        if name.endswith(".safetensors"):
            assert abs(record.bytes - plain.files[name].bytes) < 200  # the header has a recipe's hash
    packed = [record for record in calibrated.modules if record.format.name in ("int8", "nf4")]
    with_error = {record.name for record in calibrated.modules if record.weighted_error is not None}
    assert with_error == {record.name for record in packed if "embedding" not in record.name}
    assert "llm.head" in with_error  # int8 by a rule
    assert all(record.weighted_error is None for record in plain.modules)
    assert Manifest.from_json(calibrated.to_json()) == calibrated
    assert load(made[0], device="cpu").synthesize("hello world", seed=1).samples.size > 1000


def test_verify_finds_the_recorded_errors(made, capsys):
    assert command(["verify", str(made[0].folder), "--against", str(GOLDEN), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["worst"]


def test_the_same_artifact_every_time(made, tmp_path):
    recipe = load_recipe(find_recipe("nf4"), _golden(*WANTED))
    prepared = build.prepare(recipe, "")
    again = run.calibrate(prepared, CPU, quiet)
    manifest = build.run(prepared, tmp_path / "again", CPU, force=False, progress=quiet, calibrated=again)
    for name in ("llm.safetensors", "flow.safetensors"):
        assert manifest.files[name] == made[0].manifest.files[name]


def test_a_recording_is_enrolled_once(monkeypatch, whole_checkpoint, tmp_path):
    """The voice that calibration speaks with is the one that the artifact gets."""
    enrolled, spoken_with = [], []

    def enrol(*given):
        enrolled.append(entries_enrol(*given))
        return enrolled[-1]

    def listened(artifact):
        spoken_with.extend(voices := artifact_voices(artifact))
        return voices

    monkeypatch.setattr("cosyq.voices.entries.enrol", enrol)
    monkeypatch.setattr(run, "artifact_voices", listened)
    audio = GOLDEN.parent / "audio" / "zero_shot_prompt.wav"
    recording = f"voices=[{{name: me, audio: {audio}, transcript: hello there}}]"
    changes = _golden(WANTED[1], recording, f"source.path={whole_checkpoint}")
    sets = [part for change in changes for part in ("--set", change)]
    assert command(["quantize", "nf4", "--device", "cpu", "-o", str(tmp_path / "a"), *sets]) == 0
    (voice,) = enrolled
    assert [one.name for one in spoken_with] == ["me"]
    assert (tmp_path / "a" / "voices" / "me.safetensors").read_bytes() == voice.to_bytes() == spoken_with[0].to_bytes()


def test_calibration_that_changes_nothing_stops_the_build(monkeypatch, tmp_path, capsys):
    def plainly(weight, moment, fmt, device):
        return replace(NOTHING, tensors={})

    monkeypatch.setattr(run, "pack_calibrated", plainly)
    sets = [part for change in _golden(WANTED[1]) for part in ("--set", change)]
    assert command(["quantize", "nf4", "--device", "cpu", "-o", str(tmp_path / "a"), *sets]) == 3
    assert "stages.flow.calibrate: calibration improved no module" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_packed_is_nothing_to_calibrate(tmp_path):
    recipe = load_recipe(
        find_recipe("nf4"),
        _golden("rules=[{match: 'flow.*', weights: bf16}, {match: llm.head, weights: int8}]", WANTED[1]),
    )
    with pytest.raises(CheckpointError, match="improved no module"):
        run.calibrate(build.prepare(recipe, ""), CPU, quiet)


NOTHING = Calibrated({}, 0.1, 0.1, 0.1)


def _golden(*changes):
    base = ["source.repo=null", "source.revision=null", "source.sha256={}", "voices=[]", f"source.path={GOLDEN}"]
    return [*base, *changes]


def test_cosyq_minis_mel_comes_twice_as_near(tmp_path):
    """At the same bytes. Measured: 0.44 of plain nf4's distance with eight sequences, with one, of these words, 0.41."""
    changes = ["voices=[{name: default, bundled: clara}]", "stages.llm.weights=int8"]
    recipes = [load_recipe(find_recipe("mini-nf4"), [*changes, *more]) for more in ((), (WANTED[1],))]
    prepared = [build.prepare(recipe, "") for recipe in (lossless_recipe(recipes[0]), *recipes)]
    sides = []
    for index, item in enumerate(prepared):
        ready = run.calibrate(item, CPU, quiet)
        folder = tmp_path / str(index)
        build.run(item, folder, CPU, force=False, progress=quiet, calibrated=ready)
        sides.append(open_artifact(folder))
    speaker = load(sides[1], device="cpu")
    voices = [speaker.voice("default")]
    said = shown(speaker.requests, speak(speaker, ["The kitchen smells."], voices, seed=0, progress=quiet), voices)
    exact, plain, calibrated = (next(mels(network(side, "flow"), said)) for side in sides)
    distances = [log_spectral(exact, mel).mean() for mel in (plain, calibrated)]
    assert distances[1] < 0.5 * distances[0]
    assert sides[1].manifest.files["flow.safetensors"].bytes == pytest.approx(
        sides[2].manifest.files["flow.safetensors"].bytes, abs=200
    )
