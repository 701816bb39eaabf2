"""The fast flow at full size on a GPU, against the plain one: run with `pytest -m gpu tests/gpu`."""

from dataclasses import replace

import pytest
import torch
from full_flow import FULL, random_flow

from cosyq.model.flow import start_noise
from cosyq.quantize.formats import Format, four_bit
from cosyq.runtime.fused_flow import FusedFlow, Utterance

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
CUDA = torch.device("cuda")
FORMATS = [Format("int8"), four_bit("nf4", 64, False), Format("bf16")]


def utterance(tokens, prompt, *, streaming, final):
    generator = torch.Generator(CUDA).manual_seed(tokens)
    return Utterance(
        torch.randint(0, FULL.vocab, (tokens,), generator=generator, device=CUDA),
        torch.randn(FULL.speaker_dim, generator=generator, device=CUDA),
        torch.randn(2 * prompt, FULL.mel_dim, generator=generator, device=CUDA),
        streaming,
        final,
    )


def offline():
    return utterance(325, 75, streaming=False, final=True)


def streamed():
    return utterance(103, 87, streaming=True, final=False)


@pytest.fixture(scope="module")
def noise():
    return start_noise(FULL).cuda()


def called(flow, u, noise):
    how = {"streaming": u.streaming, "final": u.final, "steps": 10}
    with torch.inference_mode():
        return flow(u.tokens, u.speaker, u.prompt_mel, noise, **how)


def distance(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def rounded(_, args):
    """What a norm leaves, to eight bits, as products of codes take it."""
    step = args[0].abs().amax(-1, keepdim=True) / 127
    return (args[0] / step).round() * step, *args[1:]


@pytest.mark.parametrize(("fmt", "coded"), [*((fmt, False) for fmt in FORMATS), (FORMATS[0], True)], ids=str)
def test_as_near_to_float32_as_the_plain_flow_in_bf16(fmt, coded, noise):
    """With products of codes as near as one that rounds the same inputs to eight bits."""
    cases = (offline(), streamed())
    exact = random_flow(fmt, torch.float32, CUDA)
    expected = [called(exact, u, noise) for u in cases]
    plain = random_flow(fmt, torch.bfloat16, CUDA)
    for block in plain.estimator.blocks if coded else ():
        block.attn.register_forward_pre_hook(rounded)
        block.ff.register_forward_pre_hook(rounded)
    bounds = [1.5 * distance(called(plain, u, noise), e) for u, e in zip(cases, expected, strict=True)]
    fused = FusedFlow(plain, coded=coded)
    for u, e, bound in zip(cases, expected, bounds, strict=True):
        first, again = called(fused, u, noise), called(fused, u, noise)
        assert torch.equal(first, again)  # launched step by step, then replayed
        assert distance(first, e) < bound


@pytest.mark.parametrize("coded", [False, True])
def test_neighbours_change_nothing_but_roundings(coded, noise):
    fused = FusedFlow(random_flow(FORMATS[0], torch.bfloat16, CUDA), coded=coded)
    some = [
        offline(),
        streamed(),
        utterance(65, 50, streaming=True, final=True),
        utterance(40, 0, streaming=False, final=True),
    ]
    alone = [called(fused, u, noise) for u in some]
    for found, expected in zip(fused.solve(some, noise, steps=10), alone, strict=True):
        assert distance(found, expected) < 0.02


@pytest.mark.parametrize("coded", [False, True])
def test_a_kept_prompt_changes_nothing_but_roundings(coded, noise):
    """Launched step by step, then replayed; beside an utterance of which nothing is kept."""
    fused, u = FusedFlow(random_flow(FORMATS[0], torch.bfloat16, CUDA), coded=coded), streamed()
    expected = called(fused, u, noise)
    past = fused.keep(u.tokens[:78], u.speaker, u.prompt_mel[:150], noise, steps=10)
    asked = [offline(), replace(u, past=(past,))]
    first, again = (fused.solve(asked, noise, steps=10)[1] for _ in range(2))
    assert torch.equal(first, again)
    assert distance(first, expected) < 0.02


def test_chunks_go_on_from_each_other(noise):
    """Each costs only itself; together they are what one block-causal pass makes of the utterance, but for roundings."""
    fused = FusedFlow(random_flow(FORMATS[0], torch.bfloat16, CUDA))
    u, other = utterance(215, 65, streaming=True, final=True), utterance(140, 30, streaming=True, final=True)
    expected, beside = called(fused, u, noise), called(fused, other, noise)
    past, parts = (), []
    for tokens in (75, 100, 200, None):
        frames = 2 * (tokens or 215) - sum(segment.frames for segment in past)
        chunk = replace(u, past=past, sent=sum(part.shape[1] for part in parts))
        if tokens:
            into = fused.segment(frames, 10)
            chunk = replace(chunk, tokens=u.tokens[: tokens + 3], final=False, into=into)
            past = (*past, into)
        found = fused.solve([other, chunk], noise, steps=10)
        assert distance(found[0], beside) < 0.02
        parts.append(found[1])
    assert [part.shape[1] for part in parts] == [20, 50, 200, 30]
    assert distance(torch.cat(parts, dim=1), expected) < 0.02


def test_graphs_outlive_neither_their_memory_nor_each_other(noise):
    """A longer utterance than any before moves the activations: what was captured is captured anew."""
    fused = FusedFlow(random_flow(FORMATS[1], torch.bfloat16, CUDA))
    short = utterance(40, 0, streaming=False, final=True)
    first = called(fused, short, noise)
    for tokens in (100, 300, 900):
        called(fused, utterance(tokens, 0, streaming=False, final=True), noise)
        assert torch.equal(called(fused, short, noise), first)
