"""The checkpoint reader on the golden checkpoint, respelled and damaged."""

import json
import pickle
import re

import pytest
import torch
from conftest import GOLDEN, relative
from safetensors.torch import save_file

from cosyq.checkpoint import hyperyaml
from cosyq.checkpoint.reader import open_checkpoint, open_stage
from cosyq.errors import CheckpointError
from cosyq.model.inventory import STAGES, inventory
from cosyq.random_model import FULL, SMALL, flow_shapes, llm_shapes, vocoder_shapes, write_random

STEPS = (10,)


def read_all(folder, llm="llm.pt"):
    checkpoint = open_checkpoint(folder, llm)
    tensors = {}
    for stage in STAGES:
        opened = open_stage(checkpoint, stage, steps=STEPS)
        for module in inventory(stage, checkpoint.config, steps=STEPS):
            for parameter in module.parameters:
                tensors[f"{module.name}.{parameter}"] = opened.read(module, parameter).clone()
    return tensors


@pytest.fixture(scope="module")
def expected():
    return read_all(GOLDEN)


def rewrite(folder, name, change):
    path = folder / f"{name}.pt"
    state = torch.load(path, weights_only=True)
    torch.save(change(state) or state, path)


def same(folder, expected, llm="llm.pt"):
    found = read_all(folder, llm)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_dimensions_come_from_the_files():
    config = open_checkpoint(GOLDEN).config
    assert (config.llm.hidden_size, config.llm.num_heads, config.llm.num_kv_heads, config.llm.head_dim) == (
        64,
        4,
        2,
        16,
    )
    assert (config.flow.chunk_frames, config.flow.conv_kernel, config.flow.conv_groups) == (50, 31, 16)
    assert config.vocoder.f0_kernels == (4, 3, 3, 3, 3)
    assert config.vocoder.samples_per_frame == 480


def test_weight_norm_is_folded(expected):
    state = torch.load(GOLDEN / "hift.pt", weights_only=True)
    conv = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(80, 64, 5))
    conv.load_state_dict({k.removeprefix("conv_pre."): v for k, v in state.items() if k.startswith("conv_pre.")})
    assert relative(expected["vocoder.conv_pre.weight"], conv.weight) < 1e-6


def test_the_other_spelling_of_weight_norm_and_the_prefix(scratch_checkpoint, expected):
    def old(state):
        return {
            "generator."
            + k.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v"
            ): v
            for k, v in state.items()
        }

    rewrite(scratch_checkpoint, "hift", old)
    same(scratch_checkpoint, expected)


def test_safetensors_twins(scratch_checkpoint, expected):
    for name in ("llm", "flow", "hift"):
        state = torch.load(scratch_checkpoint / f"{name}.pt", weights_only=True)
        save_file({k: v.clone() for k, v in state.items()}, scratch_checkpoint / f"{name}.safetensors")
        (scratch_checkpoint / f"{name}.pt").unlink()
    same(scratch_checkpoint, expected)


def test_the_rl_language_model(scratch_checkpoint, expected):
    (scratch_checkpoint / "llm.pt").rename(scratch_checkpoint / "llm.rl.pt")
    same(scratch_checkpoint, expected, "llm.rl.pt")
    with pytest.raises(CheckpointError, match=r"neither llm\.pt nor llm\.safetensors is there"):
        open_checkpoint(scratch_checkpoint)


def test_transformers_5_spelling_of_the_config(scratch_checkpoint, expected):
    path = scratch_checkpoint / "CosyVoice-BlankEN" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta")}
    path.write_text(json.dumps(config))
    assert open_checkpoint(scratch_checkpoint).config == open_checkpoint(GOLDEN).config


def test_a_checkpoint_may_name_its_own_silences(scratch_checkpoint):
    assert 2323 in open_checkpoint(scratch_checkpoint).config.llm.silent_tokens
    path = scratch_checkpoint / "cosyvoice3.yaml"
    path.write_text("silent_tokens: [5, 7]\n" + path.read_text("utf-8"))
    assert open_checkpoint(scratch_checkpoint).config.llm.silent_tokens == (5, 7)


def drop(name):
    return lambda state: {k: v for k, v in state.items() if k != name}


BAD_TENSORS = {
    "missing": ("llm", drop("llm_decoder.weight"), r"llm\.pt: 1 tensors are missing: head\.weight"),
    "unknown": ("flow", lambda s: s | {"extra.weight": torch.zeros(1)}, r"1 tensors are not part of .* extra\.weight"),
    "too many": (
        "llm",
        lambda s: s | {"llm.model.model.layers.3.mlp.up_proj.weight": torch.zeros(160, 64)},
        r"1 tensors too many: llm\.model\.model\.layers\.3\.mlp\.up_proj\.weight",
    ),
    "misshapen": (
        "flow",
        lambda s: s | {"decoder.estimator.proj_out.weight": torch.zeros(80, 64)},
        r"proj_out\.weight has shape \[80, 64\], expected \[80, 128\]",
    ),
    "half a weight norm": (
        "hift",
        drop("ups.0.parametrizations.weight.original0"),
        r"ups\.0\.parametrizations\.weight\.original1 has no other half",
    ),
    "adaln": (
        "flow",
        drop("decoder.estimator.transformer_blocks.1.attn_norm.linear.bias"),
        r"1 tensors are missing: adaln\.blocks\.1\.bias",
    ),
    "integers": (
        "llm",
        lambda s: s | {"llm_decoder.weight": torch.zeros(6761, 64, dtype=torch.int64)},
        "expected a float",
    ),
    "not a tensor": ("llm", lambda s: s | {"epoch": 3}, "entry 'epoch' is a int, expected a tensor"),
    "no dict": ("flow", lambda s: [s["input_embedding.weight"]], "holds a list, expected named tensors"),
    "forged size": (
        "llm",
        lambda s: s | {"llm_decoder.weight": torch.zeros(1).expand(1 << 20, 1 << 16)},
        r"llm_decoder\.weight claims shape \[1048576, 65536\], more than the file",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_named(scratch_checkpoint, case):
    name, change, message = BAD_TENSORS[case]
    rewrite(scratch_checkpoint, name, change)
    with pytest.raises(CheckpointError, match=message):
        read_all(scratch_checkpoint)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickled_object_is_never_executed(scratch_checkpoint, capsys):
    torch.save({"llm_decoder.weight": Evil()}, scratch_checkpoint / "llm.pt", pickle_module=pickle)
    with pytest.raises(CheckpointError, match="holds pickled objects other than tensors and was not loaded"):
        open_checkpoint(scratch_checkpoint)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("keep", [0, 10, 5000, -1, -2000])
def test_truncated_files(scratch_checkpoint, keep):
    path = scratch_checkpoint / "flow.pt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"flow\.pt: (truncated|damaged)"):
        read_all(scratch_checkpoint)


def test_a_truncated_safetensors(scratch_checkpoint):
    save_file(torch.load(scratch_checkpoint / "flow.pt", weights_only=True), scratch_checkpoint / "flow.safetensors")
    path = scratch_checkpoint / "flow.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"flow\.safetensors: not a readable safetensors file"):
        read_all(scratch_checkpoint)


BAD_TEXT = {
    "yaml gone": ("cosyvoice3.yaml", None, r"cosyvoice3\.yaml: cannot be read \(No such file"),
    "yaml broken": ("cosyvoice3.yaml", lambda t: "{", "not YAML"),
    "yaml lacks a key": (
        "cosyvoice3.yaml",
        lambda t: t.replace("depth:", "d:"),
        "flow.decoder.estimator.depth is missing",
    ),
    "yaml absurd": ("cosyvoice3.yaml", lambda t: re.sub("depth: 3", "depth: 99999999999", t), "out of range"),
    "yaml wrong type": ("cosyvoice3.yaml", lambda t: re.sub("depth: 3", "depth: many", t), "many"),
    "yaml zero": ("cosyvoice3.yaml", lambda t: re.sub(" depth: 3", " depth: 0", t), "depth is 0"),
    "config no json": ("CosyVoice-BlankEN/config.json", lambda t: t[:-5], "not JSON"),
    "config list": ("CosyVoice-BlankEN/config.json", lambda t: "[]", "expected a JSON object"),
    "merges": ("CosyVoice-BlankEN/merges.txt", lambda t: t + "x y z\n", "is not a pair"),
    "vocab": ("CosyVoice-BlankEN/vocab.json", lambda t: '{"a": "b"}', "do not fit together"),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_bad_descriptions(scratch_checkpoint, case):
    name, change, message = BAD_TEXT[case]
    path = scratch_checkpoint / name
    if change is None:
        path.unlink()
    else:
        path.write_text(change(path.read_text("utf-8")), "utf-8")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(scratch_checkpoint)


def test_hyperyaml_is_data():
    data = hyperyaml.load(
        "a: 3\nb: !ref <a> * 2\nc: !apply:os.system [echo executed]\nd: !new:some.Class {x: !ref <b> * <a>, y: [!ref <a>]}\n"
        "e: !ref <f>\nf: !ref <e>\ng: !ref <nothing>\nh: !ref <a> + 1\n"
    )
    assert hyperyaml.lookup(data, "c") == ["echo executed"]
    assert hyperyaml.lookup(data, "d") == {"x": data["d"]["x"], "y": data["d"]["y"]}
    assert hyperyaml.lookup(data, "d.x") == 18
    assert hyperyaml.lookup(data, "d.y") == [3]
    for path, message in (("e", "circle"), ("g", "does not define"), ("h", "cannot read")):
        with pytest.raises(ValueError, match=message):
            hyperyaml.lookup(data, path)
    with pytest.raises(KeyError, match=r"d\.z"):
        hyperyaml.lookup(data, "d.z.w")
    with pytest.raises(ValueError, match="not YAML"):
        hyperyaml.load("a: !!python/object/apply:os.system [echo executed]")


def test_the_full_size_layout_is_the_published_one():
    published = {}
    for line in (GOLDEN.parent / "tensors.tsv").read_text().splitlines()[1:]:
        file, name, _, shape = line.split("\t")
        published.setdefault(file, {})[name] = tuple(map(int, shape.split("x")))
    assert llm_shapes(FULL) == published["llm.pt"]
    assert flow_shapes(FULL) == published["flow.pt"]
    assert vocoder_shapes(FULL) == published["hift.pt"]


def test_a_random_checkpoint_is_complete_and_fixed_by_its_seed(tmp_path):
    write_random(tmp_path / "a", SMALL, 1)
    write_random(tmp_path / "b", SMALL, 1)
    write_random(tmp_path / "c", SMALL, 2)
    same(tmp_path / "b", read_all(tmp_path / "a"))
    first, other = read_all(tmp_path / "a"), read_all(tmp_path / "c")
    assert not torch.equal(first["llm.head.weight"], other["llm.head.weight"])
    with pytest.raises(CheckpointError, match="exists already"):
        write_random(tmp_path / "a", SMALL, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_random_flow_is_modulated_as_a_trained_one(tmp_path):
    """Of order one: by tens, scores of attention would be hundreds apart."""
    write_random(tmp_path / "random", SMALL, 1)
    assert read_all(tmp_path / "random")["flow.adaln.10"].std() < 1
