"""The fast flow, its kernels in Triton's interpreter, against the plain one."""

from dataclasses import replace

import interpreter  # noqa: F401
import pytest
import torch
from conftest import relative
from torch import nn

from cosyq.model.config import FlowConfig
from cosyq.model.flow import Flow, start_noise
from cosyq.quantize.formats import Format, four_bit
from cosyq.quantize.linear import DequantLinear
from cosyq.quantize.pack import pack
from cosyq.runtime.flow_past import Pasts, Segment, numbers, whole_blocks
from cosyq.runtime.flow_weights import PackedRun
from cosyq.runtime.fused_flow import FusedFlow, Utterance

SMALL = FlowConfig(
    vocab=40, token_dim=8, mel_dim=12, speaker_dim=6, token_mel_ratio=2, lookahead=3, lookahead_channels=16,
    dim=64, depth=2, heads=2, head_dim=32, ff_dim=128, conv_kernel=4, conv_groups=4, chunk_frames=10,
    guidance=0.7, noise_frames=60,
)  # fmt: skip
CPU = torch.device("cpu")
INT8, NF4 = Format("int8"), four_bit("nf4", 64)
EXACT = 1e-5  # float32 sums in another order, through the steps


def network(*formats, config=SMALL):
    """A small random flow; its blocks' linears packed in turn by `formats`, None for none."""
    torch.manual_seed(2)
    flow = Flow(config, (1, 2))
    for name, parameter in flow.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 25
        nn.init.normal_(parameter, std=0.3 if name.startswith("adaln") else 0.7 / fan_in**0.5)
    nn.init.uniform_(flow.estimator.rope_frequencies)
    layers = [name for name, module in flow.estimator.blocks.named_modules() if isinstance(module, nn.Linear)]
    for index, name in enumerate(layers):
        fmt = formats[index % len(formats)]
        if fmt:
            parent, _, leaf = name.rpartition(".")
            layer = flow.estimator.blocks.get_submodule(name)
            tensors, _ = pack(layer.weight.detach(), fmt, CPU)
            packed = DequantLinear(fmt, tuple(layer.weight.shape), tensors, layer.bias.detach())
            setattr(flow.estimator.blocks.get_submodule(parent), leaf, packed)
    return flow.requires_grad_(False).eval()


def utterance(tokens, prompt, *, streaming, final):
    generator = torch.Generator().manual_seed(tokens)
    return Utterance(
        torch.randint(0, SMALL.vocab, (tokens,), generator=generator),
        torch.randn(SMALL.speaker_dim, generator=generator),
        torch.randn(2 * prompt, SMALL.mel_dim, generator=generator),
        streaming,
        final,
    )


def called(flow, u, steps=2):
    how = {"streaming": u.streaming, "final": u.final, "steps": steps}
    with torch.inference_mode():
        return flow(u.tokens, u.speaker, u.prompt_mel, start_noise(SMALL), **how)


OFFLINE = utterance(13, 4, streaming=False, final=True)
STREAMED = utterance(17, 5, streaming=True, final=False)
MIXED = (INT8, None, INT8, NF4, NF4, NF4, INT8, INT8, INT8, INT8, None, INT8)  # one block after the other


@pytest.mark.parametrize("formats", [(None,), (INT8,), (NF4,), MIXED], ids=["float", "int8", "nf4", "mixed"])
def test_equals_the_plain_flow(formats):
    expected = called(network(*formats), STREAMED)
    assert relative(called(FusedFlow(network(*formats)), STREAMED), expected) < EXACT


@pytest.fixture
def few_tiles(monkeypatch):
    """For utterances side by side, of which a GPU has many to spare."""
    monkeypatch.setattr("cosyq.runtime.fused_flow.MANY_BESIDE", 2)


@pytest.mark.usefixtures("few_tiles")
def test_one_after_another_and_side_by_side():
    """Other lengths, prompts, masks and numbers of steps; what ran before or beside an utterance does not touch it."""
    plain, fused = network(INT8), FusedFlow(network(INT8))
    alone = [called(plain, u) for u in (OFFLINE, STREAMED)]
    assert relative(called(fused, OFFLINE), alone[0]) < EXACT
    assert relative(called(fused, STREAMED, steps=1), called(plain, STREAMED, steps=1)) < EXACT
    together = fused.solve([STREAMED, OFFLINE], start_noise(SMALL), steps=2)
    for found, expected in zip(together, reversed(alone), strict=True):
        assert relative(found, expected) < EXACT


@pytest.mark.usefixtures("few_tiles")
def test_goes_on_from_what_is_kept_of_a_prompt():
    """Two voices, one of which is not kept, an utterance beside them; the second time through the same memory."""
    plain, fused, noise = network(INT8), FusedFlow(network(INT8)), start_noise(SMALL)
    kept, other = utterance(19, 14, streaming=True, final=False), utterance(16, 9, streaming=True, final=True)
    frames = whole_blocks(SMALL, len(kept.prompt_mel))
    assert frames == 20
    past = fused.keep(kept.tokens[: 10 + 3], kept.speaker, kept.prompt_mel[:frames], noise, steps=2)
    assert past.memory.shape == (2, numbers(SMALL, frames))
    asked = [STREAMED, replace(kept, past=(past,)), other]
    for _ in range(2):
        for found, u in zip(fused.solve(asked, noise, steps=2), asked, strict=True):
            assert relative(found, called(plain, u)) < EXACT


def upto(u, tokens, *, final=False):
    """A stream's chunk: an utterance as far as so many of its tokens, the prompt's included."""
    return replace(u, tokens=u.tokens[:tokens], final=final)


@pytest.mark.usefixtures("few_tiles")
def test_chunks_go_on_from_each_other():
    """Streams side by side: one behind a kept prompt, one without, one that had no room for its second chunk; together
    they are what one block-causal pass makes of each. Beside them one that keeps nothing."""
    plain, fused, noise = network(INT8), FusedFlow(network(INT8)), start_noise(SMALL)
    first, second, third = (
        utterance(tokens, prompt, streaming=True, final=True) for tokens, prompt in ((27, 14), (28, 2), (26, 9))
    )
    prompt = fused.keep(first.tokens[: 10 + 3], first.speaker, first.prompt_mel[:20], noise, steps=2)
    pasts, parts, beside = [(prompt,), (), ()], [[], [], []], called(plain, OFFLINE)
    for tokens, unkept in ((15 + 3, None), (20 + 3, 2), (25 + 3, None), (None, None)):
        chunks = []
        for index, u in enumerate((first, second, third)):
            past, sent = pasts[index], sum(part.shape[1] for part in parts[index])
            chunk = upto(u, tokens, final=tokens is None or tokens > len(u.tokens))
            if not chunk.final and index != unkept:
                chunk = replace(chunk, into=fused.segment(2 * (tokens - 3) - sum(s.frames for s in past), 2))
            chunks.append(replace(chunk, past=past, sent=sent))
        *mels, other = fused.solve([*chunks, OFFLINE], noise, steps=2)
        assert relative(other, beside) < EXACT
        for index, (chunk, mel) in enumerate(zip(chunks, mels, strict=True)):
            if chunk.into is not None:
                pasts[index] = (*chunk.past, chunk.into)
            parts[index].append(mel)
    for u, mels in zip((first, second, third), parts, strict=True):
        assert relative(torch.cat(mels, dim=1), called(plain, u)) < EXACT


@pytest.mark.parametrize(("prompt", "frames"), [(0, 0), (10, 0), (15, 0), (16, 10), (25, 10), (26, 20), (60, 50)])
def test_whole_blocks_of_a_prompt_with_their_look_ahead(prompt, frames):
    assert whole_blocks(SMALL, prompt) == frames


def test_blocks_shorter_than_what_is_convolved_are_not_kept():
    assert whole_blocks(replace(SMALL, conv_kernel=11), 16) == 0
    assert whole_blocks(replace(SMALL, conv_kernel=11), 36) == 30


def test_prompts_are_kept_from_the_second_time_on_as_far_as_there_is_room():
    made, pasts = [], Pasts()

    def ask(key, size=4):
        def make():
            made.append(key)
            return Segment(1, torch.zeros(1, size, dtype=torch.uint8))

        return pasts.get(key, size, make)

    assert ask("a") is ask("a") is None  # there is no room at all
    pasts.room = 20
    assert ask("a") is None
    assert pasts.find("a") is None
    first = ask("a")
    assert first is ask("a") is pasts.find("a")
    assert [ask("b"), ask("b") is not None, ask("a") is first] == [None, True, True]
    assert [ask("c"), ask("c") is not None] == [None, True]  # and b, not asked for the longest, goes
    assert pasts.find("b") is None
    assert pasts.find("a") is first
    assert ask("d", 11) is ask("d", 11) is None
    assert made == ["a", "b", "c"]


def test_there_is_room_for_an_utterance_until_another_holds_it():
    pasts = Pasts()

    def segment(size):
        return pasts.segment(size, lambda: Segment(1, torch.zeros(1, size, dtype=torch.uint8)))

    assert segment(1) is None
    pasts.room = 20
    held = [segment(12), segment(8)]
    assert [s.memory.nbytes for s in held] == [12, 8]
    assert segment(1) is None
    assert [pasts.get("a", 4, lambda: segment(4)) for _ in range(3)] == [None] * 3  # nor for a voice
    del held[1]
    assert segment(9) is None
    assert pasts.get("a", 4, lambda: Segment(1, torch.zeros(1, 4, dtype=torch.uint8))) is not None
    assert segment(4) is not None

    def fails():
        raise torch.OutOfMemoryError

    assert pasts.segment(1, fails) is None


@pytest.mark.parametrize(("formats", "left"), [((INT8,), 0), (MIXED, 1)], ids=["int8", "mixed"])
def test_weights_unpacked_once_are_the_same(formats, left):
    """All that are packed; of the mixed network one matrix is not."""
    fused = FusedFlow(network(*formats))
    expected = called(fused, STREAMED)
    sizes = [layer.numel() * 4 for layer in network(None).estimator.blocks.parameters() if layer.dim() == 2]
    size = sum(sizes) - left * SMALL.dim * SMALL.ff_dim * 4
    assert fused.unpack(size - 1) == 0
    assert torch.equal(called(fused, STREAMED), expected)
    assert fused.unpack(size) == size
    assert not any(block.scratch_bytes for block in fused._blocks)
    assert torch.equal(called(fused, STREAMED), expected)
    assert fused.unpack(size) == 0


def test_room_grows_with_what_is_asked_for(monkeypatch):
    monkeypatch.setattr("cosyq.runtime.fused_flow.ROOM", 32)
    plain, fused = network(None), FusedFlow(network(None))
    for u in (OFFLINE, utterance(20, 0, streaming=False, final=True), OFFLINE):
        assert relative(called(fused, u, steps=1), called(plain, u, steps=1)) < EXACT


def test_takes_the_flow_apart():
    """No weight is kept twice: of the plain flow only what comes before the estimator is left."""
    flow = network(INT8)
    FusedFlow(flow)
    assert not hasattr(flow, "estimator")
    assert {name.partition(".")[0] for name, _ in flow.named_parameters()} == {
        "token_embedding",
        "token_encoder",
        "speaker_proj",
    }


def test_an_utterance_beyond_the_noise_is_refused():
    with pytest.raises(ValueError, match="62 frames asked for, the fixed noise covers 60"):
        called(FusedFlow(network(None)), utterance(31, 0, streaming=False, final=True))


@pytest.mark.parametrize("fmt", [INT8, NF4, four_bit("nf4", 64, False)], ids=str)
def test_layers_of_one_kind_unpack_as_one(fmt):
    """As they do at full size, where a layer has whole groups of scales; here 256 and 512 blocks."""
    layers = []
    for rows, width in ((128, 128), (128, 256)):
        tensors, _ = pack(torch.randn(rows, width), fmt, CPU)
        layers.append(DequantLinear(fmt, (rows, width), tensors, None))
    both = PackedRun.of(layers[0]).followed_by(PackedRun.of(layers[1]))
    out = torch.full((both.count,), float("nan"))
    both.unpack(out)
    assert torch.equal(out, torch.cat([layer.weight().view(-1) for layer in layers]))


def rounded(_, args):
    """What a norm leaves, to eight bits."""
    step = args[0].abs().amax(-1, keepdim=True) / 127
    return (args[0] / step).round() * step, *args[1:]


def test_products_of_codes_are_those_of_rounded_inputs():
    """In float32, where next to no code falls the other way; streamed, beside another, and after a kept prompt."""
    wide = replace(SMALL, dim=256, heads=4, head_dim=64, ff_dim=256, conv_groups=2)
    plain, fused = network(INT8, config=wide), FusedFlow(network(INT8, config=wide), coded=True)
    exact = called(plain, STREAMED, 1)
    for block in plain.estimator.blocks:
        block.attn.register_forward_pre_hook(rounded)
        block.ff.register_forward_pre_hook(rounded)
    assert relative(exact, called(plain, STREAMED, 1)) > 1e-3
    kept, noise = utterance(19, 14, streaming=True, final=False), start_noise(SMALL)
    past = fused.keep(kept.tokens[: 10 + 3], kept.speaker, kept.prompt_mel[:20], noise, steps=1)
    asked = [STREAMED, replace(kept, past=(past,))]
    found = fused.solve(asked, noise, steps=1)
    for mel, u in zip(found, asked, strict=True):
        assert relative(mel, called(plain, u, 1)) < 1e-4
    assert fused.unpack(1 << 30) == 2 * 2 * 256 * 256 * 4  # of two blocks the matrices that no norm comes before
    for mel, again in zip(found, fused.solve(asked, noise, steps=1), strict=True):
        assert torch.equal(mel, again)
