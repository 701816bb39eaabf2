"""An artifact written, read back, and damaged in every way a download or a disk can think of."""

import hashlib
import json
import shutil

import pytest
import torch
from conftest import GOLDEN, make_artifact
from safetensors import safe_open

from cosyq.artifact.manifest import Manifest
from cosyq.artifact.reader import StageFile, load_stage, open_artifact, stage_tensors, text_rows
from cosyq.artifact.stagefile import DTYPES, StageFileWriter, header_bytes
from cosyq.audit import measure_errors, verify_artifact
from cosyq.errors import ArtifactError, CheckpointError
from cosyq.model.inventory import STAGES
from cosyq.quantize.formats import Format, four_bit
from cosyq.quantize.pack import pack
from cosyq.random_model import SMALL, write_random
from cosyq.voices.voice import Voice

CPU = torch.device("cpu")
RECIPES = {"int8": (), "nf4": (), "fp4": ("stages.llm.weights=fp4", "stages.flow.weights=fp4"), "fp32": (), "bf16": ()}


@pytest.fixture(params=RECIPES)
def artifact(request, artifact_of):
    shipped = "nf4" if request.param == "fp4" else request.param
    return open_artifact(artifact_of(shipped, *RECIPES[request.param]))


def test_it_reloads_bit_for_bit(artifact, golden):
    """What is read is what packing the source again gives, tensor by tensor."""
    from cosyq.checkpoint.reader import open_checkpoint, open_stage

    checkpoint = open_checkpoint(GOLDEN)
    for stage in STAGES:
        source, file = open_stage(checkpoint, stage, steps=(10,)), StageFile(artifact, stage)
        for module in artifact.modules(stage):
            stored = file.read(module)
            for parameter in module.parameters:
                exact = parameter != "weight" or module.kind == "exact"
                fmt = Format("fp32") if exact else artifact.formats[module.name]
                for name, tensor in pack(source.read(module, parameter), fmt, CPU)[0].items():
                    found = stored[parameter if exact else name]
                    assert found.dtype == tensor.dtype
                    assert torch.equal(found, tensor), f"{module.name} {name}"


def test_any_safetensors_reader_can_read_it(artifact):
    for stage in STAGES:
        expected = stage_tensors(artifact.modules(stage), artifact.formats)
        with safe_open(artifact.folder / f"{stage}.safetensors", framework="pt") as handle:
            assert set(handle.keys()) == set(expected)
            assert handle.metadata()["cosyq_stage"] == stage
            for name, (dtype, shape) in expected.items():
                tensor = handle.get_tensor(name)
                assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
                assert tensor.data_ptr() % dtype.itemsize == 0  # aligned in the mapped file


@pytest.mark.parametrize("recipe", ["int8", "nf4"])
def test_same_inputs_same_bytes(artifact_of, tmp_path, recipe):
    first = artifact_of(recipe)
    moved = shutil.copytree(GOLDEN, tmp_path / "elsewhere")
    second = make_artifact(tmp_path / "b", recipe, source=moved)
    names = sorted(str(p.relative_to(first)) for p in first.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(second)) for p in second.rglob("*") if p.is_file())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_the_bytes_do_not_depend_on_the_number_of_threads(artifact_of, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - threads)
    try:
        other = make_artifact(tmp_path / "a", "int8")
    finally:
        torch.set_num_threads(threads)
    assert (other / "manifest.json").read_bytes() == (artifact_of("int8") / "manifest.json").read_bytes()


def test_the_manifest_tells_where_it_came_from(artifact_of):
    manifest = open_artifact(artifact_of("int8")).manifest
    for name in ("llm.pt", "flow.pt", "hift.pt", "cosyvoice3.yaml", "CosyVoice-BlankEN/merges.txt"):
        assert manifest.source.files[name] == hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest()
    record = next(m for m in manifest.modules if m.name == "llm.layers.1.mlp.down_proj")
    assert (record.format, record.rule, record.shape) == (Format("int8"), "stages.llm", (64, 160))
    assert (record.source_dtype, record.bytes) == ("float32", 64 * 160 + 4 * 64 + 1)
    assert 0.003 < record.rms_error < 0.01
    assert set(manifest.versions) == {"cosyq", "torch", "bitsandbytes"}
    assert str(GOLDEN) not in manifest.to_json()
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_text_rows_are_those_of_the_source(artifact_of):
    source = torch.load(GOLDEN / "llm.pt", weights_only=True)["llm.model.model.embed_tokens.weight"]
    ids = [0, 599, 303, 7]
    assert torch.equal(text_rows(open_artifact(artifact_of("fp32")))(ids), source[ids])
    packed = text_rows(open_artifact(artifact_of("int8")))(ids)
    assert ((packed - source[ids]).norm() / source[ids].norm()).item() < 0.01


def test_a_rule_reaches_the_embedding(tmp_path):
    artifact = open_artifact(
        make_artifact(tmp_path / "a", "int8", "rules=[{match: llm.text_embedding, weights: bf16}]")
    )
    assert str(artifact.formats["llm.text_embedding"]) == "bf16"
    assert text_rows(artifact)([3]).dtype == torch.float32


def test_speaking_needs_no_yaml_no_bitsandbytes_and_nothing_else_that_takes_time(artifact_of):
    import subprocess
    import sys

    code = (
        "import sys, cosyq; cosyq.load(sys.argv[1], device='cpu').synthesize('hello', seed=1);"
        "print([m for m in ('yaml', 'bitsandbytes', 'transformers', 'pydantic', 'onnxruntime', 'huggingface_hub',"
        " 'torch._inductor', 'torch._dynamo', 'sympy', 'triton', 'typer', 'rich', 'jinja2', 'soundfile', 'wetext',"
        " 'fastapi') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(artifact_of("nf4"))], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_tokenizer_larger_than_the_embedding(scratch_artifact):
    tokenizer = json.loads((scratch_artifact / "tokenizer.json").read_text())
    more = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] += [{"id": 581 + i, "content": f"<more{i}>", **more} for i in range(40)]
    (scratch_artifact / "tokenizer.json").write_text(json.dumps(tokenizer))
    resign(scratch_artifact, lambda data: None)
    with pytest.raises(ArtifactError, match=r"has 621 entries, the text embedding 600 rows"):
        open_artifact(scratch_artifact).tokenizer()


# ---- damage


def flip(path, position, bit=0):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["llm.safetensors", "flow.safetensors", "vocoder.safetensors", "tokenizer.json", "recipe.yaml"]
)
@pytest.mark.parametrize("where", [0, 9, 0.3, -1])
def test_a_flipped_bit_is_found(scratch_artifact, name, where):
    path = scratch_artifact / name
    flip(path, int(path.stat().st_size * where) if isinstance(where, float) else where)
    with pytest.raises(ArtifactError, match=f"{name}.*quantize or download it again"):
        open_artifact(scratch_artifact)


def test_a_flipped_bit_in_a_large_file_is_found_by_verify(scratch_artifact, monkeypatch):
    """Large files are hashed in full by `verify` alone; their headers always."""
    monkeypatch.setattr("cosyq.artifact.reader.HASHED_ALWAYS", 100_000)
    artifact = open_artifact(scratch_artifact)
    verify_artifact(artifact)
    flip(scratch_artifact / "llm.safetensors", -1)
    opened = open_artifact(scratch_artifact)
    with pytest.raises(ArtifactError, match=r"llm\.safetensors: sha256 is"):
        verify_artifact(opened)
    flip(scratch_artifact / "flow.safetensors", 100)
    with pytest.raises(ArtifactError, match=r"flow\.safetensors"):
        open_artifact(scratch_artifact)


def test_a_header_that_swaps_two_tensors_is_found(scratch_artifact, monkeypatch):
    """Same names, same shapes, the file's size: only the header's hash tells."""
    monkeypatch.setattr("cosyq.artifact.reader.HASHED_ALWAYS", 100_000)
    path = scratch_artifact / "llm.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    one, other = (header[f"layers.{i}.mlp.up_proj.weight"] for i in (0, 1))
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    changed = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(data[:8] + changed + data[8 + length :])
    with pytest.raises(ArtifactError, match="header does not hash"):
        open_artifact(scratch_artifact)


@pytest.mark.parametrize("position", [5, 2000, -30])
def test_a_changed_manifest_is_found(scratch_artifact, position):
    flip(scratch_artifact / "manifest.json", position)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        open_artifact(scratch_artifact)


@pytest.mark.parametrize("name", ["llm.safetensors", "vocoder.safetensors", "tokenizer.json", "manifest.json"])
def test_a_missing_file(scratch_artifact, name):
    (scratch_artifact / name).unlink()
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        open_artifact(scratch_artifact)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file(scratch_artifact, keep):
    path = scratch_artifact / "flow.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"flow\.safetensors: has \d+ bytes, expected"):
        open_artifact(scratch_artifact)


def resign(folder, change):
    """Rewrite the manifest as a careful forger would, digest included."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    data.pop("digest", None)
    for name, record in data["files"].items():
        file = folder / name
        if file.is_file():
            content = file.read_bytes()
            record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            if "header_sha256" in record:
                record["header_sha256"] = hashlib.sha256(
                    content[: 8 + int.from_bytes(content[:8], "little")]
                ).hexdigest()
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    path.write_text(json.dumps(data | {"digest": hashlib.sha256(canonical.encode()).hexdigest()}))


def test_a_stage_in_another_stage_s_place(scratch_artifact):
    shutil.copy(scratch_artifact / "vocoder.safetensors", scratch_artifact / "flow.safetensors")
    resign(scratch_artifact, lambda data: None)
    with pytest.raises(ArtifactError, match=r"flow\.safetensors: says cosyq_stage 'vocoder', expected 'flow'"):
        open_artifact(scratch_artifact)


def test_a_stage_of_another_recipe(scratch_artifact, artifact_of):
    shutil.copy(artifact_of("nf4") / "llm.safetensors", scratch_artifact / "llm.safetensors")
    resign(scratch_artifact, lambda data: None)
    with pytest.raises(ArtifactError, match=r"llm\.safetensors: says cosyq_recipe"):
        open_artifact(scratch_artifact)


FORGERIES = {
    "newer": (lambda d: d.update(schema=9, minimum_reader=9), "schema 9 needs a reader of 9; .*upgrade cosyq"),
    "other format": (lambda d: d["modules"][5].update(format={"name": "fp32"}), "expected F32"),
    "unknown format": (lambda d: d["modules"][5].update(format={"name": "int2"}), "not a format"),
    "module gone": (lambda d: d["modules"].pop(5), "does not say how"),
    "escape": (lambda d: d["files"].update({"../../etc/passwd": d["files"]["recipe.yaml"]}), "not the name of a file"),
    "absolute": (lambda d: d["files"].update({"/etc/passwd": d["files"]["recipe.yaml"]}), "not the name of a file"),
    "other model": (lambda d: d["model"]["llm"].update(hidden_size=128), "expected"),
    "huge model": (lambda d: d["model"]["llm"].update(hidden_size=1 << 40), "out of range"),
    "model key": (lambda d: d["model"]["flow"].pop("depth"), r"missing keys \['depth'\]"),
    "steps": (lambda d: d.update(flow_steps=[10, 20]), "adaln.20"),
    "unlisted file": (lambda d: d["files"].pop("flow.safetensors"), "does not list flow.safetensors"),
    "types": (lambda d: d.update(modules=3), "wrong type"),
    "no recipe": (lambda d: d.update(recipe=[]), "wrong type"),
    "recipe without a source": (lambda d: d["recipe"].pop("source"), "'source'"),
    "recipe without a checkpoint": (lambda d: d["recipe"]["source"].pop("llm"), "'llm'"),
    "checkpoint elsewhere": (lambda d: d["recipe"]["source"].update(llm="../llm.pt"), "'../llm.pt' is not a name"),
    "bundled elsewhere": (lambda d: d["recipe"]["source"].update(bundled="../.."), "'../..' is not a name"),
    "bundled of another type": (lambda d: d["recipe"]["source"].update(bundled=["mini"]), "expected text"),
    "recipe without stages": (lambda d: d["recipe"].pop("stages"), "'stages'"),
    "recipe without a stage": (lambda d: d["recipe"]["stages"].pop("flow"), "'flow'"),
    "stage without a format": (lambda d: d["recipe"]["stages"]["llm"].pop("weights"), "'weights'"),
    "more stages": (lambda d: d["recipe"]["stages"].update(more=1), "wrong type"),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_a_forged_manifest(scratch_artifact, case):
    change, message = FORGERIES[case]
    resign(scratch_artifact, change)
    with pytest.raises(ArtifactError, match=message):
        open_artifact(scratch_artifact)


@pytest.mark.parametrize("content", ["", "null", "[]", "{", "[" * 100_000, '{"schema": "x"}'])
def test_what_is_no_manifest(scratch_artifact, content):
    (scratch_artifact / "manifest.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        open_artifact(scratch_artifact)


def test_a_quantization_state_of_another_weight(tmp_path):
    folder = make_artifact(tmp_path / "a", "nf4")
    path = folder / "llm.safetensors"
    data = path.read_bytes()
    assert data.count(b'"shape": [64, 160]') == 3
    path.write_bytes(data.replace(b'"shape": [64, 160]', b'"shape": [16, 640]', 1))
    resign(folder, lambda data: None)
    with pytest.raises(ArtifactError, match=r"down_proj: quantization state .* does not describe"):
        load_stage(open_artifact(folder), "llm", device=CPU, dtype=torch.float32, matmul="dequantize")


def test_verify_against_the_source(artifact, tmp_path):
    errors = list(measure_errors(artifact, GOLDEN, lambda *_: None))
    assert [e.name for e in errors] == [m.name for stage in STAGES for m in artifact.modules(stage)]
    assert all(abs(e.measured - e.recorded) < 1e-5 for e in errors)


def test_verify_against_another_source(artifact_of, scratch_checkpoint, tmp_path):
    artifact = open_artifact(artifact_of("int8"))
    state = torch.load(scratch_checkpoint / "llm.pt", weights_only=True)
    state["llm.model.model.layers.1.mlp.up_proj.weight"] += 0.1
    torch.save(state, scratch_checkpoint / "llm.pt")
    with pytest.raises(ArtifactError, match=r"llm\.layers\.1\.mlp\.up_proj differs from the source"):
        list(measure_errors(artifact, scratch_checkpoint, lambda *_: None))
    broken = make_artifact(tmp_path / "broken", "fp32")
    with safe_open(broken / "llm.safetensors", framework="pt") as file:
        norm = file.get_tensor("norm.weight").numpy().tobytes()
    data = (broken / "llm.safetensors").read_bytes()
    (broken / "llm.safetensors").write_bytes(data.replace(norm, b"\xff" * len(norm)))  # not a number
    resign(broken, lambda data: None)
    with pytest.raises(ArtifactError, match=r"norm differs from the source by nan"):
        list(measure_errors(open_artifact(broken), GOLDEN, lambda *_: None))
    write_random(tmp_path / "other", SMALL, 0)
    with pytest.raises(ArtifactError, match="was made from another model"):
        list(measure_errors(artifact, tmp_path / "other", lambda *_: None))


# ---- writing


def left_behind(folder):
    return sorted(path.name for path in folder.iterdir())


def test_nothing_is_left_when_the_work_fails(tmp_path, scratch_checkpoint):
    """A weight that is not finite is found half-way through; the folder is as before."""
    state = torch.load(scratch_checkpoint / "flow.pt", weights_only=True)
    state["decoder.estimator.transformer_blocks.1.attn_norm.linear.weight"][3, 3] = float("nan")
    torch.save(state, scratch_checkpoint / "flow.pt")
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(CheckpointError, match=r"flow\.pt: tensor .*blocks\.1\.attn_norm\.linear\.weight holds NaN"):
        make_artifact(target / "artifact", "int8", source=scratch_checkpoint)
    assert left_behind(target) == []


@pytest.mark.parametrize(
    "name", ["llm_decoder.weight", "llm.model.model.norm.weight", "llm.model.model.embed_tokens.weight"]
)
@pytest.mark.parametrize("recipe", ["int8", "fp32"])
def test_a_weight_that_is_not_finite_is_named(tmp_path, scratch_checkpoint, name, recipe):
    state = torch.load(scratch_checkpoint / "llm.pt", weights_only=True)
    state[name].view(-1)[7] = float("inf")
    torch.save(state, scratch_checkpoint / "llm.pt")
    with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN or infinity"):
        make_artifact(tmp_path / "artifact", recipe, source=scratch_checkpoint)


def test_an_existing_artifact_stays_unless_forced(scratch_artifact):
    before = (scratch_artifact / "manifest.json").read_bytes()
    with pytest.raises(ArtifactError, match="exists already; give another -o, or --force"):
        make_artifact(scratch_artifact, "nf4")
    assert (scratch_artifact / "manifest.json").read_bytes() == before
    make_artifact(scratch_artifact, "nf4", force=True)
    assert open_artifact(scratch_artifact).manifest.name.endswith("nf4")
    assert left_behind(scratch_artifact.parent) == ["artifact"]


def test_force_does_not_replace_what_is_no_artifact(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("years of work")
    with pytest.raises(ArtifactError, match="is not an artifact and will not be replaced"):
        make_artifact(tmp_path / "thesis", "int8", force=True)
    assert (tmp_path / "thesis" / "chapter1").read_text() == "years of work"


def test_a_full_disk_is_seen_before_and_during(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=17 << 20))
    with pytest.raises(ArtifactError, match=r"MB are needed, 17\.8 MB are free|MB are needed, 18 MB are free"):
        make_artifact(tmp_path / "a", "int8")
    monkeypatch.undo()

    def full(self, name, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StageFileWriter, "write", full)
    with pytest.raises(ArtifactError, match=r"a: cannot be written \(No space left on device\)"):
        make_artifact(tmp_path / "a", "int8")
    assert left_behind(tmp_path) == []


def test_a_pinned_source_must_be_that_source(tmp_path):
    wrong = "0" * 64
    with pytest.raises(CheckpointError, match=f"llm.pt: sha256 is .*, the recipe pins {wrong}"):
        make_artifact(tmp_path / "a", "int8", f"source.sha256={{llm.pt: '{wrong}'}}")
    assert left_behind(tmp_path) == []


def test_voices_come_along(tmp_path, voice):
    file = tmp_path / "me.safetensors"
    file.write_bytes(voice.to_bytes())
    artifact = open_artifact(make_artifact(tmp_path / "a", "int8", f"voices=[{{name: me, file: {file}}}]"))
    assert list(artifact.voice_files()) == ["me"]
    (recorded,) = artifact.manifest.recipe["voices"]
    assert recorded == {
        "name": "me",
        "transcript": None,
        "sha256": artifact.manifest.files["voices/me.safetensors"].sha256,
    }
    verify_artifact(artifact)
    stranger = Voice.from_speaker("x", torch.zeros(7))
    file.write_bytes(stranger.to_bytes())
    with pytest.raises(ArtifactError, match="speaker is"):
        make_artifact(tmp_path / "b", "int8", f"voices=[{{name: me, file: {file}}}]")


def test_a_file_is_laid_out_by_width_and_written_in_any_order(tmp_path):
    specs = {"a": (torch.int8, (3,)), "b": (torch.float32, (2,)), "c": (torch.bfloat16, (1,))}
    header, places = header_bytes(specs, {"k": "v"})
    assert [name for name, _ in sorted(places.items(), key=lambda item: item[1])] == ["b", "c", "a"]
    assert len(header) % 8 == 0
    assert all(place % specs[name][0].itemsize == 0 for name, (place, _) in places.items())
    with StageFileWriter(tmp_path / "f", specs, {"k": "v"}) as file:
        for name in ("c", "a", "b"):
            file.write(name, torch.ones(specs[name][1], dtype=specs[name][0]))
        with pytest.raises(ValueError, match="the plan said"):
            file.write("a", torch.ones(3))
    with safe_open(tmp_path / "f", framework="pt") as handle:
        assert all(torch.equal(handle.get_tensor(n), torch.ones(s, dtype=d)) for n, (d, s) in specs.items())
    with pytest.raises(ValueError, match=r"f2 lacks \['a'\]"), StageFileWriter(tmp_path / "f2", {"a": specs["a"]}, {}):
        pass
    assert set(DTYPES) >= {spec[0] for spec in specs.values()}


def test_four_bit_blocks_are_recorded(artifact_of):
    formats = open_artifact(artifact_of("nf4")).formats
    assert formats["flow.estimator.blocks.0.ff.up"] == four_bit("nf4", 64, True)
