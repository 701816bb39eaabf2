"""The fused language model in Triton's interpreter: the plain one's ids, in fp32, over every format it reads."""

from dataclasses import replace

import interpreter  # noqa: F401
import pytest
import torch
from torch import nn

from cosyq.kernels import rows as kernels
from cosyq.kernels.decode import PAGE
from cosyq.model.config import LLMConfig, SamplingConfig
from cosyq.model.llm import LanguageModel
from cosyq.quantize.formats import Format, four_bit
from cosyq.quantize.linear import DequantLinear
from cosyq.quantize.pack import pack
from cosyq.runtime import fused_llm
from cosyq.runtime.batch import BatchDecoder
from cosyq.runtime.forward import Prompt, TorchForward
from cosyq.runtime.fused_llm import FusedDecoder, FusedForward, FusedLM

CONFIG = LLMConfig(
    hidden_size=96, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, rope_theta=1e6,
    rms_norm_eps=1e-6, text_rows=4, speech_vocab=40, speech_rows=44, silent_tokens=(),
)  # fmt: skip
SAMPLING = SamplingConfig(top_p=0.8, top_k=25, win_size=10, tau_r=0.1)
LONGEST = 20
CPU = torch.device("cpu")


def language_model(*formats: Format | None) -> LanguageModel:
    """Random weights; the linear layers take turns with the formats, None for none."""
    generator = torch.Generator().manual_seed(0)
    llm = LanguageModel(CONFIG)
    for name, parameter in llm.named_parameters():
        parameter.requires_grad_(False).normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
    linears = [(name, module) for name, module in llm.named_modules() if isinstance(module, nn.Linear)]
    for index, (name, linear) in enumerate(linears):
        fmt = formats[index % len(formats)]
        if fmt is not None:
            tensors, _ = pack(linear.weight, fmt, CPU)
            parent, _, leaf = name.rpartition(".")
            shape = tuple(linear.weight.shape)
            setattr(llm.get_submodule(parent), leaf, DequantLinear(fmt, shape, tensors, linear.bias))
    return llm.eval()


def plain(llm: LanguageModel, rows: int) -> BatchDecoder:
    return BatchDecoder(TorchForward(llm, rows=rows, capacity=3 * PAGE), SAMPLING, longest=LONGEST)


def fused(llm: LanguageModel, rows: int) -> FusedDecoder:
    return FusedDecoder(
        FusedForward(FusedLM(llm, torch.float32), rows=rows, capacity=3 * PAGE), SAMPLING, longest=LONGEST
    )


def prompt(seed: int, length: int) -> torch.Tensor:
    return torch.randn(1, length, CONFIG.hidden_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "formats",
    [
        (Format("int8"),),
        (four_bit("nf4", 32),),
        (four_bit("fp4", 32, double_quant=False),),
        (None,),
        (Format("int8"), four_bit("nf4", 32), None),  # nothing that goes together is alike
    ],
    ids=lambda formats: "+".join(str(f) for f in formats),
)
def test_logits_are_the_plain_ones(formats):
    """After a prompt, and in steps at the end of a page and at the begin of the next."""
    llm = language_model(*formats)
    expected = TorchForward(llm, rows=1, capacity=3 * PAGE)
    found = FusedForward(FusedLM(llm, torch.float32), rows=1, capacity=3 * PAGE)
    torch.testing.assert_close(
        found.prefill([Prompt(0, prompt(1, 9), 0)]), expected.prefill([Prompt(0, prompt(1, 9), 0)])
    )
    found.reserve(0, PAGE)
    first = found.buffers.pages[0, 0]
    for mine, its in ((found.keys, expected._cache.keys), (found.values, expected._cache.values)):
        torch.testing.assert_close(mine[:, first, :, :9], its[:, 0, :, :9])
        its[:, 0, :, 9:PAGE].normal_(generator=torch.Generator().manual_seed(1))  # a longer past, for less time
        mine[:, first, :, 9:] = its[:, 0, :, 9:PAGE]
    for position, token in ((PAGE - 1, 7), (PAGE, 30)):
        found.reserve(0, position + 1)
        ids, positions = torch.tensor([token]), torch.tensor([position])
        torch.testing.assert_close(found(ids, positions, 3 * PAGE), expected(ids, positions, 3 * PAGE))


@pytest.mark.parametrize("fmt", [Format("int8"), four_bit("nf4", 32)], ids=str)
def test_prompts_are_run_together(monkeypatch, fmt):
    """Ragged ones, over several chunks, one of them behind what its row holds already; columns of a product shared."""
    small = kernels.Tile(64, 32, 32, 4, 1)
    shared = kernels.Tiles(small, replace(small, splits=3), small, replace(small, n=16, splits=2), small)
    monkeypatch.setattr(kernels, "tiles", lambda rows, **_: shared)
    monkeypatch.setattr(fused_llm, "CHUNK", 48)
    monkeypatch.setattr(fused_llm, "SIZES", (48,))
    llm = language_model(fmt)
    expected = TorchForward(llm, rows=4, capacity=3 * PAGE)
    found = FusedForward(FusedLM(llm, torch.float32), rows=4, capacity=3 * PAGE)
    for shown in (
        [Prompt(2, prompt(1, 5), 0)],
        [
            Prompt(3, prompt(2, 20), 0),
            Prompt(0, prompt(3, 1), 0),
            Prompt(2, prompt(4, 33), 5),
            Prompt(1, prompt(5, 7), 0),
        ],
    ):
        torch.testing.assert_close(found.prefill(shown), expected.prefill(shown))
    ids, positions = torch.tensor([3, 9, 30, 1]), torch.tensor([1, 7, 38, 20])
    torch.testing.assert_close(found(ids, positions, PAGE), expected(ids, positions, PAGE))


@pytest.mark.parametrize("fmt", [Format("int8"), four_bit("nf4", 32)], ids=str)
def test_more_rows_than_sixteen(fmt):
    """Of int8 they are two tiles, else one."""
    llm = language_model(fmt)
    expected = TorchForward(llm, rows=18, capacity=PAGE)
    found = FusedForward(FusedLM(llm, torch.float32), rows=18, capacity=PAGE)
    for row in range(18):
        found.reserve(row, 1)
    ids, positions = torch.arange(18), torch.zeros(18, dtype=torch.int64)
    torch.testing.assert_close(found(ids, positions, PAGE), expected(ids, positions, PAGE))


def run(decoder: BatchDecoder, joins: list[tuple[int, torch.Tensor, int]]) -> dict[int, tuple[list[int], str]]:
    """Utterances that join at given steps: what each said and how it ended, by its seed."""
    said: dict[int, list[int]] = {}
    ended: dict[int, str] = {}
    rows: dict[int, int] = {}
    step = 0
    while len(ended) < len(joins):
        for at, embeddings, seed in joins:
            if at == step:
                generator = torch.Generator().manual_seed(seed)
                rows[decoder.join(embeddings, minimum=4, maximum=5 + seed, generator=generator)] = seed
                said[seed] = []
        decoder.step()
        step += 1
        for row, news in decoder.news().items():
            assert news.error is None
            said[rows[row]] += news.tokens
            if news.finish:
                ended[rows[row]] = news.finish
                decoder.leave(row)
    return {seed: (said[seed], ended[seed]) for seed in said}


JOINS = [(0, prompt(2, 20), 1), (2, prompt(3, 12), 2), (3, prompt(4, 5), 3), (9, prompt(5, 9), 4)]


def test_rows_that_join_and_leave_say_what_the_plain_decoder_says():
    llm = language_model(Format("int8"))
    assert run(fused(llm, 4), JOINS) == run(plain(llm, 4), JOINS)


def test_a_row_alone_says_the_same():
    llm = language_model(four_bit("nf4", 32))
    joins = [JOINS[1]]
    assert run(fused(llm, 1), joins) == run(plain(llm, 1), joins)


def test_an_utterance_goes_on_where_more_is_shown():
    llm = language_model(Format("int8"))
    results = []
    for decoder in (plain(llm, 1), fused(llm, 1)):
        row = decoder.join(prompt(6, 10), minimum=9, maximum=3, room=9, generator=torch.Generator().manual_seed(1))
        tokens = []
        for part in (3, 6, 9):
            if part > 3:
                last = llm.embed_speech(torch.tensor(tokens[-1:]))[None]
                decoder.extend(row, torch.cat([last, prompt(part, 4)], dim=1), minimum=9, maximum=part)
            finish = None
            while finish is None:
                decoder.step()
                news = decoder.news().get(row)
                tokens, finish = tokens + news.tokens, news.finish
        results.append(tokens)
    assert results[0] == results[1]
    assert len(results[0]) == 9


def test_pages_come_back_and_more_are_made():
    """Twice as many rows' worth as there are pages at first, again and again."""
    forward = FusedForward(FusedLM(language_model(None), torch.float32), rows=2, capacity=8 * PAGE)
    pages = forward.keys.shape[1]
    for _ in range(3):
        for row in (0, 1):
            forward.reserve(row, 7 * PAGE)
        taken = forward.buffers.pages[:, :7].flatten().tolist()
        assert len(set(taken)) == 14
        assert 0 not in taken
        for row in (0, 1):
            forward.release(row)
        assert forward.buffers.pages.sum() == 0
    assert pages < forward.keys.shape[1] <= 2 * pages


def test_logits_that_are_not_finite_are_told():
    llm = language_model(Format("int8"))
    llm.norm.weight.data.fill_(float("nan"))
    decoder = fused(llm, 1)
    row = decoder.join(prompt(1, 4), minimum=1, maximum=4, generator=torch.Generator().manual_seed(0))
    decoder.step()
    assert decoder.news()[row].error is not None


def test_sampling_is_that_of_the_plain_sampler():
    """Over flat and peaked logits, repeats, and a stop that may not come yet: the same ids of the same numbers."""
    from cosyq.kernels.draw import KEPT, Draws, draw
    from cosyq.runtime.batch_sampling import sample_rows

    rows, n, vocabulary = 16, 100, 90
    generator = torch.Generator().manual_seed(3)
    for sharpness in (0.1, 2.0, 8.0):
        logits = torch.randn(rows, n, generator=generator) * sharpness
        uniform = torch.rand(rows, 1, 2, generator=generator)
        recent = torch.randint(-1, vocabulary, (rows, 10), generator=generator)
        recent[::2, 3] = logits[::2, :vocabulary].argmax(-1)  # so that many repeat themselves
        minimum = torch.arange(rows) % 2
        count = torch.zeros(rows, dtype=torch.int64)
        expected = sample_rows(
            logits, recent, uniform[:, 0], SAMPLING, forbidden=count < minimum, forbid_from=vocabulary
        )
        drawn = torch.zeros(rows, dtype=torch.int64)
        draws = Draws(
            logits, uniform, recent.clone(), count.clone(), minimum, count + 5, count + 7,
            torch.zeros(rows, dtype=torch.uint8), drawn, torch.zeros(rows, KEPT, dtype=torch.int64),
        )  # fmt: skip
        x, positions = torch.zeros(rows, 8), torch.zeros(rows, dtype=torch.int32)
        embedding = torch.randn(n, 8, generator=generator)
        draw(draws, x, positions, embedding, None, SAMPLING, rows=rows, vocabulary=vocabulary, pdl=False)
        assert drawn.tolist() == expected.tolist()
        spoken = expected < vocabulary
        torch.testing.assert_close(x[spoken], embedding[expected[spoken]])
        assert draws.finished.bool().tolist() == (~spoken).tolist()
        assert (positions[spoken] == 7).all()
        assert torch.equal(draws.next, 7 + spoken.long())
