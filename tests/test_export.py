"""The language model for transformers: real transformers load it on the CPU and compute what ours does."""

import json
import re

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import make_artifact, refused, relative
from transformers import AutoModelForCausalLM, AutoTokenizer

from cosyq.artifact.reader import load_stage, open_artifact
from cosyq.model.llm import KVCache
from cosyq.random_model import SMALL, write_random

CPU = torch.device("cpu")
ALL_IN_FOUR = ("rules=[]",)  # the shipped recipe keeps the head in eight bits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """With random biases and norms: the golden one's are zeros and ones."""
    folder = tmp_path_factory.mktemp("random") / "checkpoint"
    write_random(folder, SMALL, seed=0)
    state = torch.load(folder / "llm.pt", weights_only=True)
    assert all(state[name].std() > 0 for name in state if name.endswith("proj.bias"))
    for name in state:
        if name.endswith("norm.weight"):
            state[name] += 0.2 * torch.randn(state[name].shape, generator=torch.Generator().manual_seed(1))
    torch.save(state, folder / "llm.pt")
    return folder


@pytest.fixture
def exported(cli, checkpoint, tmp_path):
    """Export as the command does; (artifact, folder)."""

    def call(recipe, *changes):
        artifact = make_artifact(tmp_path / "artifact", recipe, *changes, source=checkpoint)
        code, out, err = cli("export", "hf", artifact, "-o", tmp_path / "hf")
        assert (code, out) == (0, f"{tmp_path / 'hf'}\n"), err
        return open_artifact(artifact), tmp_path / "hf"

    return call


def inputs(config):
    return torch.randn(1, 12, config.llm.hidden_size, generator=torch.Generator().manual_seed(0)) * 0.3


@torch.inference_mode()
def ours(artifact):
    """Logits of the reference, float32."""
    config = artifact.manifest.model
    llm = load_stage(artifact, "llm", device=CPU, dtype=torch.float32, matmul="dequantize")
    return llm.logits(llm(inputs(config), KVCache.empty(config.llm, 12, device=CPU, dtype=torch.float32)))


@torch.inference_mode()
def theirs(artifact, model, *, exact=True):
    """Logits of transformers'. bitsandbytes multiplies in the activations' own precision only in its training mode.

    Otherwise, on a CPU, it rounds them to eight bits for eight-bit weights, and may round to bf16 for four-bit ones.
    """
    model.train(exact)
    return model(inputs_embeds=inputs(artifact.manifest.model).to(model.dtype)).logits.float()


def linears(model, kind):
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_floats_give_the_same_logits(exported, recipe):
    artifact, folder = exported(recipe)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert relative(theirs(artifact, whole), ours(artifact)) < 1e-6
    if recipe == "bf16":  # which is what it is loaded as; norms and sums are in 16 bits there, and float32 here
        halved = AutoModelForCausalLM.from_pretrained(folder)
        assert halved.dtype == torch.bfloat16
        assert 1e-4 < relative(theirs(artifact, halved), ours(artifact)) < 0.02


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_four_bits_give_the_same_logits(exported, name):
    artifact, folder = exported("nf4", *ALL_IN_FOUR, f"stages.llm.weights={name}")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert linears(model, Linear4bit) == linears(model, torch.nn.Linear)
    assert model.lm_head.weight.quant_state.quant_type == name
    assert relative(theirs(artifact, model), ours(artifact)) < 1e-5


def test_eight_bits_give_the_same_logits(exported):
    artifact, folder = exported("int8")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert linears(model, Linear8bitLt) == linears(model, torch.nn.Linear)
    assert relative(theirs(artifact, model), ours(artifact)) < 1e-5
    assert 1e-4 < relative(theirs(artifact, model, exact=False), ours(artifact)) < 0.05


def test_one_packed_format_goes_along(exported):
    """Of the shipped nf4 the head, which is in eight bits, is unpacked, and loaded without a second rounding."""
    artifact, folder = exported("nf4")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["bnb_4bit_quant_type"], config["llm_int8_skip_modules"]) == ("nf4", ["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert linears(model, Linear4bit) == linears(model, torch.nn.Linear) - {"lm_head"}
    assert relative(theirs(artifact, model), ours(artifact)) < 1e-5
    assert relative(theirs(artifact, model, exact=False), ours(artifact)) < 0.05


@pytest.mark.parametrize("recipe", ["int8", "bf16"])
def test_it_speaks_as_its_readme_says(exported, recipe, monkeypatch):
    artifact, folder = exported(recipe)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    found = {}
    exec(code, found)
    config = artifact.manifest.model.llm
    speech = found["speech"][0].tolist()
    assert len(speech) > 5
    assert all(0 <= number < config.speech_rows for number in speech)
    assert all(number < config.speech_vocab for number in speech[:-1])  # it ends with the first stop id
    text = "You are a helpful assistant.<|endofprompt|>Hello 中文."
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert ids == artifact.tokenizer().encode(text)


def test_what_is_refused(cli, artifact_of, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis").write_text("years of work")
    refused(cli("export", "hf", artifact_of("int8"), "-o", tmp_path / "there"), 3, "exists already")
    refused(cli("export", "hf", tmp_path / "none", "-o", tmp_path / "b"), 3, "no such artifact")
    artifact = make_artifact(tmp_path / "nf4", "nf4")
    path = artifact / "llm.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(cli("export", "hf", artifact, "-o", tmp_path / "b"), 3, "llm.safetensors: sha256 is")
    assert not (tmp_path / "b").exists()
