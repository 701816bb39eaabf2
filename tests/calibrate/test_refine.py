"""Refined recipes, from the file to an artifact that speaks."""

import json

import pytest
import torch
from conftest import GOLDEN

from cosyq.artifact.reader import StageFile, open_artifact, text_rows
from cosyq.calibrate import refine as refining
from cosyq.calibrate import run
from cosyq.calibrate.llm import llm_moments, next_logits, sequence_embeddings
from cosyq.cli.main import run as command
from cosyq.errors import RecipeError
from cosyq.quantize.formats import dequantize, four_bit
from cosyq.quantize.learned import LearnedCodes
from cosyq.quantize.pack import pack
from cosyq.recipe import find_recipe, load_recipe
from cosyq.runtime.synthesizer import load

CPU = torch.device("cpu")
NF4 = four_bit("nf4", 32)
SOURCE = ("source.repo=null", "source.revision=null", "source.sha256={}", "voices=[]", f"source.path={GOLDEN}")
CALIBRATED = "stages.llm.calibrate={sequences: 4}"
REFINED = "stages.llm.calibrate={sequences: 4, refine: 4}"


def quantize(folder, *changes):
    sets = [part for change in (*SOURCE, *changes) for part in ("--set", change)]
    return command(["quantize", "nf4", "--device", "cpu", "-o", str(folder), *sets])


@pytest.fixture(autouse=True, scope="module")
def small_batches():
    """Twelve steps of three sequences."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refining, "BATCH", 1)
        patch.setattr(refining, "PACE", 1e-3)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The golden checkpoint's nf4 artifact, calibrated and refined, and only calibrated."""
    folder = tmp_path_factory.mktemp("refined")
    assert quantize(folder / "refined", REFINED) == quantize(folder / "calibrated", CALIBRATED) == 0
    return open_artifact(folder / "refined"), open_artifact(folder / "calibrated")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.llm.calibrate={refine: 1}", "sequences: missing"),
        ("stages.llm.calibrate={sequences: 9, refine: 0}", "greater than or equal to 1"),
        ("stages.llm.calibrate={sequences: 1, refine: 1}", "refine needs two sequences"),
        ("stages.flow.calibrate={sequences: 9, refine: 1}", "unknown key, valid here: sequences"),
    ],
)
def test_recipes_say_it_of_the_language_model_alone(change, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(find_recipe("mini-nf4"), [change])


def test_the_digest_knows_of_refinement():
    calibrated, refined = (load_recipe(find_recipe("mini-nf4"), [change]) for change in (CALIBRATED, REFINED))
    assert calibrated.resolved()["stages"]["llm"]["calibrate"] == {"sequences": 4}
    assert refined.resolved()["stages"]["llm"]["calibrate"] == {"sequences": 4, "refine": 4}


def test_codes_norms_and_biases_are_learned_in_the_same_bytes(made):
    refined, calibrated = (side.manifest for side in made)
    assert [record.bytes for record in refined.modules] == [record.bytes for record in calibrated.modules]
    errors, before = ({m.name: m.rms_error for m in side.modules} for side in (refined, calibrated))
    for name in ("llm.norm", "llm.layers.0.input_layernorm"):
        assert before[name] == 0 < errors[name] < 0.1
    files = [StageFile(side, "llm") for side in made]
    modules = {module.name: module for module in made[0].modules("llm")}
    changed = set()
    for name, record in {m.name: m for m in refined.modules}.items():
        if name.startswith("llm.") and record.format.name == "nf4":
            one, other = (file.read(modules[name]) for file in files)
            changed |= {key for key in one if not torch.equal(one[key], other[key])}
    assert changed == {"weight"}  # absmax are as they were, and the golden biases are zero
    assert load(made[0], device="cpu").synthesize("hello world", seed=1).samples.size > 1000


def test_verify_finds_the_recorded_errors(made, capsys):
    assert command(["verify", str(made[0].folder), "--against", str(GOLDEN), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["worst"]


def test_the_same_artifact_every_time(made, tmp_path):
    assert quantize(tmp_path / "again", REFINED) == 0
    again = open_artifact(tmp_path / "again").manifest
    assert again.files["llm.safetensors"] == made[0].manifest.files["llm.safetensors"]


def test_the_divergence_falls_where_nothing_was_learned(artifact_of):
    """From plain packing, on sequences that were not shown. Measured: 0.69 of what it was."""
    exact = open_artifact(artifact_of("fp32"))
    said, rows = run._speak(exact, 8, CPU, lambda *_: None), text_rows(exact)
    teacher, student = (run._network(exact, "llm", CPU) for _ in range(2))
    paths = [path for path, module in teacher.named_modules() if isinstance(module, torch.nn.Linear)]
    moments = llm_moments(teacher, rows, said[:6], paths, lambda *_: None)
    codes = {}
    for path in paths:
        weight = teacher.get_submodule(path).weight
        codes[path] = LearnedCodes(weight, moments.of(path), NF4, pack(weight, NF4, CPU)[0])
        student.get_submodule(path).weight.data = codes[path].weight()
    before = refining._judged(teacher, student, rows, said[6:])
    vectors = refining.refine(teacher, student, rows, said[:6], codes, 4, lambda *_: None)
    after = refining._judged(teacher, student, rows, said[6:])
    assert after < 0.8 * before
    assert set(vectors) == {name for name, value in teacher.named_parameters() if value.ndim == 1 and value.any()}
    for path in paths:  # what was judged is what is stored
        torch.testing.assert_close(
            dequantize(NF4, codes[path].tensors(), tuple(codes[path].weight().shape)),
            student.get_submodule(path).weight.data,
        )
    embeddings = sequence_embeddings(teacher, rows, said[7])
    wanted, found = (next_logits(side, embeddings, said[7]).log_softmax(-1) for side in (teacher, student))
    mine = (wanted.exp() * (wanted - found)).sum(-1)
    torch.testing.assert_close(refining._divergence(teacher, student, rows, said[7]), mine, rtol=1e-3, atol=1e-5)


def test_refinement_that_changes_nothing_stops_the_build(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(refining, "PACE", 0.0)
    monkeypatch.setattr(refining, "RATE", 0.0)
    assert quantize(tmp_path / "a", "stages.llm.calibrate={sequences: 2, refine: 1}") == 3
    assert "stages.llm.calibrate.refine: refinement improved nothing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
