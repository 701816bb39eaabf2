"""What the roofline counts: against torch's own counter on the networks, and against what was counted before by hand."""

from types import SimpleNamespace

import pytest
import torch
from random_vocoder import FULL as FULL_VOCODER
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cosyq.artifact.reader import open_artifact
from cosyq.bench.counts import flow_operations, llm_operations, vocoder_operations
from cosyq.bench.machine import Rates
from cosyq.bench.roofline import Floor, floors, weights_read
from cosyq.model.config import FlowConfig, LLMConfig, ModelConfig, SamplingConfig
from cosyq.model.inventory import STAGES, inventory
from cosyq.model.llm import KVCache
from cosyq.model.vocoder import StreamState
from cosyq.quantize.plan import make_plan
from cosyq.recipe import find_recipe, load_recipe
from cosyq.runtime.synthesizer import load

FULL_LLM = LLMConfig(896, 4864, 24, 14, 2, 64, 1e6, 1e-6, 151_936, 6561, 6761, ())
FULL_FLOW = FlowConfig(6561, 80, 80, 192, 2, 3, 1024, 1024, 22, 16, 64, 2048, 31, 16, 50, 0.7)
FULL = ModelConfig(FULL_LLM, SamplingConfig(0.8, 25, 10, 0.1), FULL_FLOW, FULL_VOCODER)
MATRIX, CONVOLUTION = ("mm", "addmm"), ("convolution", "_convolution")


@pytest.fixture(scope="module")
def tts(artifact_of):
    return load(artifact_of("fp32"), device="cpu", dtype="fp32", engine="unpacked")


def counted(work):
    """Operations that torch counts in `work`, by the name of the function; attention as two products of a batch."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        work()
    return {str(name).split(".")[-1]: count for name, count in counter.get_flop_counts()["Global"].items()}


def total(counts, names):
    return sum(count for name, count in counts.items() if name in names)


@pytest.mark.parametrize(("new", "past"), [(40, 0), (1, 60)])
def test_the_language_model(tts, new, past):
    config, llm = tts.engine.config.llm, tts.engine.llm
    cache = KVCache.empty(config, new + past, device=torch.device("cpu"), dtype=torch.float32)
    cache.length = past
    counts = counted(lambda: llm.logits(llm(torch.zeros(1, new, config.hidden_size), cache)[:, -1]))
    ours = llm_operations(tts.artifact.modules("llm"), config, new=new, past=past)
    assert ours.products == total(counts, MATRIX)
    assert ours.convolutions == 0
    # The network multiplies what it then masks; we count what is seen.
    seen = (past + (new + 1) / 2) / (past + new)
    assert ours.attention == pytest.approx(seen * total(counts, ("bmm",)))


def test_the_flow(tts):
    config, flow = tts.engine.config.flow, tts.engine.flow
    tokens, prompt, steps = 60, 25, 10
    speaker, mel = torch.ones(config.speaker_dim), torch.zeros(2 * prompt, config.mel_dim)
    noise = torch.zeros(config.noise_frames, config.mel_dim)
    ids = torch.zeros(tokens, dtype=torch.int64)
    counts = counted(lambda: flow(ids, speaker, mel, noise, streaming=False, final=True, steps=steps))
    ours = flow_operations(tts.artifact.modules("flow"), config, tokens=tokens, steps=steps)
    assert ours.products == pytest.approx(total(counts, MATRIX), rel=0.001)
    assert ours.convolutions == pytest.approx(total(counts, CONVOLUTION), rel=0.001)
    assert ours.attention == pytest.approx(total(counts, ("bmm",)), rel=0.001)
    assert ours.total == pytest.approx(sum(counts.values()), rel=0.001)


def test_the_vocoder(tts):
    config, vocoder = tts.engine.config.vocoder, tts.engine.vocoder
    frames = 200
    mel = torch.full((1, config.mel_dim, frames), -6.0)
    counts = counted(lambda: vocoder.render(mel, StreamState(), final=True))
    ours = vocoder_operations(tts.artifact.modules("vocoder"), config, frames=frames)
    assert ours.products == total(counts, (*MATRIX, "bmm"))
    assert ours.convolutions == pytest.approx(total(counts, CONVOLUTION), rel=1e-4)  # a column more at the beginning


def test_the_published_size():
    """docs/speed.md: 364 MB a token, 4.8 TFLOP of products and 185 MB a step in the flow, 33 GFLOP a second."""
    modules = {stage: inventory(stage, FULL, steps=(10,)) for stage in STAGES}
    seconds, prompt = 10, 75
    flow = flow_operations(modules["flow"], FULL.flow, tokens=25 * seconds + prompt, steps=10)
    assert flow.products == pytest.approx(4.8e12, rel=0.02)
    assert flow.total < 1.2 * flow.products
    assert vocoder_operations(modules["vocoder"], FULL.vocoder, frames=50).total == pytest.approx(33e9, rel=0.03)
    assert llm_operations(modules["llm"], FULL.llm, new=1, past=0).products == pytest.approx(2 * 364e6, rel=0.01)

    recipe = load_recipe(find_recipe("int8"))
    decisions = make_plan(recipe, [module for stage in STAGES for module in modules[stage]])
    records = [SimpleNamespace(name=d.module.name, bytes=d.bytes) for d in decisions]
    held = {stage: sum(d.bytes for d in decisions if d.module.stage == stage) for stage in STAGES}
    held["llm"] -= next(r.bytes for r in records if r.name == "llm.text_embedding")  # on the host
    read = weights_read(SimpleNamespace(manifest=SimpleNamespace(modules=records)), held)
    assert read["llm"] == pytest.approx(364e6, rel=0.01)
    assert read["flow"] == pytest.approx(185e6, rel=0.1)  # with what is not in the blocks, in 16 bits
    assert read["vocoder"] == pytest.approx(83e6, rel=0.01)


def test_a_floor_is_the_slower_of_two():
    slow_memory, slow_products = Rates(1e9, 1e15), Rates(1e15, 1e9)
    operations = SimpleNamespace(total=3_000_000_000)
    assert Floor.of(2_000_000_000, operations, slow_memory).seconds == 2
    assert Floor.of(2_000_000_000, operations, slow_products).seconds == 3


def test_floors_of_an_artifact(artifact_of):
    """Weights once for each token, once for each step of the flow, and keys and values as far as they go."""
    artifact = open_artifact(artifact_of("int8"))
    c = artifact.manifest.model.llm
    held = {"llm": 10_000_000, "flow": 10_000_000, "vocoder": 1_000_000}
    read = weights_read(artifact, held)
    assert read["vocoder"] == held["vocoder"]
    assert 10_000_000 - read["llm"] == c.speech_rows * (c.hidden_size + 4) + 1  # looked up: int8 rows
    found = floors(artifact, held, Rates(1e9, 1e9), positions=107, prompt=75, tokens=250, steps=10, itemsize=2)
    position = 2 * c.num_layers * c.num_kv_heads * c.head_dim * 2
    assert found.prefill.bytes == read["llm"] + 107 * position
    assert found.token.bytes == read["llm"] + (107 + 125) * position
    assert found.flow.bytes == 10 * read["flow"]
    assert found.vocoder.operations == pytest.approx(
        10 * vocoder_operations(artifact.modules("vocoder"), artifact.manifest.model.vocoder, frames=50).total
    )
