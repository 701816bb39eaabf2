"""The language model for Triton's kernels: weights stacked as they are stored, keys and values in pages."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cosyq.kernels import decode as step
from cosyq.kernels import rows as kernels
from cosyq.kernels.decode import PAGE, Buffers, Geometry, Layer
from cosyq.kernels.draw import KEPT, Draws, draw
from cosyq.kernels.packed import INT8, Packed, float_rows, four_bit_rows, int8_rows, stacked
from cosyq.kernels.rows import TOGETHER, Pass, Rows, Shape
from cosyq.model.config import LLMConfig, SamplingConfig
from cosyq.model.llm import LanguageModel, rope_tables
from cosyq.quantize.linear import DequantLinear, PackedEmbedding
from cosyq.runtime.batch import BatchDecoder
from cosyq.runtime.chunks import chunks
from cosyq.runtime.forward import Prompt
from cosyq.runtime.recording import recorded
from cosyq.runtime.transfer import sent

FIRST_PAGES = 4  # of a row: 512 positions, a prompt and ten seconds
CHUNK = 512  # positions of prompts that are run at a time
SIZES = (32, 64, 96, 128, 192, 256, 384, CHUNK)  # what their number is rounded up to
BURST = 4  # ids a step on a GPU, which waits 0.1 ms between graphs while the host learns what was drawn


def packed_rows(linear: Any, dtype: torch.dtype) -> Packed:
    """A layer's weights for the kernels; what they cannot read as it is stored is unpacked to `dtype`."""
    bias = getattr(linear, "bias", None)
    bias = None if bias is None else bias.detach().float()
    if not isinstance(linear, DequantLinear):
        return float_rows(linear.weight.detach(), bias)
    t, fmt = linear.packed, linear.format
    if fmt.name == "int8":
        return int8_rows(t["weight"], t["SCB"], bias)
    assert fmt.blocksize is not None
    if linear.shape[1] % fmt.blocksize:  # blocks cross rows
        return float_rows(linear.weight().to(dtype), bias)
    nested = (t["weight.nested_absmax"], t["weight.nested_quant_map"], linear.offset) if fmt.double_quant else None
    return four_bit_rows(
        t["weight"], t["weight.absmax"], t["weight.quant_map"], nested, linear.shape, fmt.blocksize, bias
    )


def stack(linears: list[Any], dtype: torch.dtype) -> Packed:
    """Layers with one input as one. Those of unlike formats are unpacked to `dtype`.

    The layers give up their own tensors for views of the stack.
    """
    parts = [packed_rows(linear, dtype) for linear in linears]
    whole = stacked(parts)
    if whole is None:
        weights = [m.weight() if isinstance(m, DequantLinear) else m.weight.detach() for m in linears]
        whole = stacked([float_rows(w.to(dtype), p.bias) for w, p in zip(weights, parts, strict=True)])
        assert whole is not None
        return whole
    first = 0
    for linear, part in zip(linears, parts, strict=True):
        rows = slice(first, first + part.n)
        first += part.n
        if not isinstance(linear, DequantLinear):
            linear.weight = nn.Parameter(whole.weight[rows], requires_grad=False)
        elif linear.format.name == "int8":
            linear.packed |= {"weight": whole.weight[rows], "SCB": whole.scales[rows]}
        else:
            per_row = part.k // part.block
            linear.packed["weight"] = whole.weight[rows.start * part.k // 2 : rows.stop * part.k // 2]
            linear.packed["weight.absmax"] = whole.scales[rows.start * per_row : rows.stop * per_row]
    return whole


def with_bias(packed: Packed) -> Packed:
    if packed.bias is not None:
        return packed
    return replace(packed, bias=torch.zeros(packed.n, device=packed.weight.device))


def fused_layer(layer: Any, dtype: torch.dtype) -> Layer:
    """Of a `model.llm.Block`, which keeps views of the weights."""
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        attention_norm=layer.input_layernorm.weight.detach().float(),
        qkv=with_bias(stack([attention.q_proj, attention.k_proj, attention.v_proj], dtype)),
        output=packed_rows(attention.o_proj, dtype),
        mlp_norm=layer.post_attention_layernorm.weight.detach().float(),
        gate_up=stack([mlp.gate_proj, mlp.up_proj], dtype),
        down=packed_rows(mlp.down_proj, dtype),
    )


class FusedLM:
    """A language model's weights for the kernels; the model keeps views of them.

    What computes is in `FusedForward`, which any number of decoders may have one of.
    """

    def __init__(self, llm: LanguageModel, dtype: torch.dtype):
        self.config, self.dtype, self.device = llm.config, dtype, llm.norm.weight.device
        self.pdl = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (9, 0)
        self.layers = [fused_layer(layer, dtype) for layer in llm.layers]
        self.int8 = all(w.kind == INT8 for y in self.layers for w in (y.qkv, y.output, y.gate_up, y.down))
        self.norm = llm.norm.weight.detach().float()
        self.head = packed_rows(llm.head, dtype)
        embedding: Any = llm.speech_embedding
        packed = isinstance(embedding, PackedEmbedding)
        self.embedding: Tensor = embedding.packed["weight"] if packed else embedding.weight.detach()
        self.scales: Tensor | None = embedding.packed["SCB"] if packed else None
        self.embed: Callable[[Tensor], Tensor] = llm.embed_speech


class FusedForward:
    """The key-value cache of `rows` utterances in pages, and the passes over it; a `runtime.forward.Forward`.

    keys, values: [layers, pages, kv_heads, PAGE, head_dim]; page 0 is nobody's: rows without an utterance write there.
    """

    def __init__(self, lm: FusedLM, *, rows: int, capacity: int):
        c, device = lm.config, lm.device
        self.lm, self.config, self.device, self.rows = lm, c, device, rows
        self.pages_a_row = -(-capacity // PAGE)
        self.capacity = self.pages_a_row * PAGE
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=-1)  # between the kernels of whatever else runs
            self._stream.wait_stream(torch.cuda.current_stream(device))  # for the weights
        with self.aside():
            self._allocate(c, rows)

    def _allocate(self, c: LLMConfig, rows: int) -> None:
        device, dtype = self.device, self.lm.dtype
        self.recorded = Recordings(device)
        self._shape = Shape(c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim, c.rms_norm_eps)
        self._pages: list[list[int]] = [[] for _ in range(rows)]
        shape = (c.num_layers, 1 + rows * min(FIRST_PAGES, self.pages_a_row), c.num_kv_heads, PAGE, c.head_dim)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self._free = list(range(1, shape[1]))
        # On the host: each kernel of torch's that a process uses for the first time may take 50 ms to load.
        cos, sin = rope_tables(torch.arange(self.capacity), c.head_dim, c.rope_theta)
        half = c.head_dim // 2
        rope = cos[:, :half].contiguous().to(device), sin[:, :half].contiguous().to(device)
        pages = torch.zeros(rows, self.pages_a_row, dtype=torch.int32, device=device)
        positions = torch.full((rows,), -1, dtype=torch.int32, device=device)
        owners = torch.arange(rows, dtype=torch.int32, device=device)
        self._table = torch.zeros(4, CHUNK, dtype=torch.int32, device=device)  # of the positions of prompts
        self._batch = kernels.rows_of(self._shape, positions, owners, pages, *rope, dtype, together=False)
        self._prompt = kernels.rows_of(self._shape, self._table[0], self._table[1], pages, *rope, dtype, together=True)
        self._prompt_logits = torch.zeros(CHUNK // TOGETHER, c.speech_rows, device=device)
        self.buffers = Buffers(  # of a row alone, but for what all rows share
            x=self._batch.x,
            q=torch.zeros(c.num_heads * c.head_dim, device=device),
            parts=torch.zeros(c.num_heads, self.pages_a_row, c.head_dim, device=device),
            stats=torch.zeros(c.num_heads, self.pages_a_row, 2, device=device),
            inner=torch.zeros(c.intermediate_size, device=device),
            positions=positions,
            pages=pages,
            cos=rope[0],
            sin=rope[1],
        )

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def taken(self, embeddings: Tensor) -> Tensor:
        if self._stream is not None and (current := torch.cuda.current_stream(self.device)) != self._stream:
            self._stream.wait_stream(current)
            embeddings.record_stream(self._stream)
        return embeddings

    def reserve(self, row: int, positions: int) -> None:
        """Let the row have so many positions: pages are taken as they are needed."""
        taken = self._pages[row]
        while len(taken) * PAGE < min(positions, self.capacity):
            if not self._free:
                self._grow()
            taken.append(self._free.pop())
            self.buffers.pages[row, len(taken) - 1] = taken[-1]

    def release(self, row: int) -> None:
        """The row's pages are free; it writes to nobody's from here on."""
        self._free += self._pages[row]
        self._pages[row] = []
        self.buffers.pages[row] = 0
        self.buffers.positions[row] = -1

    def _grow(self) -> None:
        """Twice the pages. What was recorded knows the old ones."""
        pages = self.keys.shape[1]
        self.recorded.clear()
        self.keys, self.values = (torch.cat([t, torch.zeros_like(t)], dim=1) for t in (self.keys, self.values))
        self._free += range(pages, 2 * pages)

    def pages_for(self, positions: int) -> int:
        """Pages that kernels look at, a power of two: few numbers, so that few are recorded."""
        return min(max(1 << (-(-positions // PAGE) - 1).bit_length(), FIRST_PAGES), self.pages_a_row)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Prompt]) -> Tensor:
        """As `Forward.prefill`: positions of all prompts are rows of the same passes, `CHUNK` at most at a time."""
        logits = torch.empty(len(prompts), self.config.speech_rows, device=self.device)
        for p in prompts:
            self.reserve(p.row, p.past + p.embeddings.shape[1])
        given = torch.cat([p.embeddings[0] for p in prompts]).float()
        placed = [(p.row, p.past, p.embeddings.shape[1]) for p in prompts]
        for chunk in chunks(placed, size=CHUNK, tile=TOGETHER):
            self._table.copy_(sent(chunk.table, self.device))
            rows = next(size for size in SIZES if size >= chunk.rows)
            kernels.gather(given, self._table[2], self._prompt.x[:rows])
            ends = -(-len(chunk.ended) // TOGETHER) * TOGETHER
            self.recorded.run(("prompts", rows, ends), partial(self._show, rows, ends))
            logits[chunk.ended.start : chunk.ended.stop] = self._prompt_logits[: len(chunk.ended)]
        return logits

    def _show(self, rows: int, ends: int) -> None:
        """The first rows of `_prompt`, and the logits behind those that end a prompt."""
        p = Pass(rows, 0, True, self._shape, self.lm.pdl)
        self._run_rows(self._prompt, p)
        if ends:
            kernels.run_head(self.lm.head, self._table[3], self._prompt_logits[:ends], self._prompt, p)

    @torch.inference_mode()
    def __call__(self, ids: Tensor, positions: Tensor, span: int) -> Tensor:
        b, rows = self.buffers, len(ids)
        b.x[:rows], b.positions[:rows] = self.lm.embed(ids), positions
        logits = torch.empty(rows, self.config.speech_rows, device=self.device)
        self.run(logits, rows, self.pages_for(span))
        return logits

    def run(self, logits: Tensor, rows: int, pages: int) -> None:
        """logits [rows, n] that follow `buffers.x` at `buffers.positions`, none beyond the row's first `pages`."""
        lm, b, c = self.lm, self.buffers, self.config
        if rows == 1:
            geometry = Geometry(
                c.num_heads, c.num_kv_heads, c.head_dim, self.pages_a_row, pages, c.rms_norm_eps, lm.pdl
            )
            for layer, keys, values in zip(lm.layers, self.keys, self.values, strict=True):
                step.run_layer(layer, keys, values, b, geometry)
            step.run_head(lm.norm, lm.head, logits, b, geometry)
            return
        p = Pass(rows, pages, False, self._shape, lm.pdl, lm.int8)
        self._run_rows(self._batch, p)
        kernels.run_head(lm.head, self._batch.owners, logits[:rows], self._batch, p)

    def _run_rows(self, b: Rows, p: Pass) -> None:
        """The first rows of b.x after all layers, in place, and what the last norm needs."""
        layers = self.lm.layers
        gains = [*(layer.attention_norm for layer in layers[1:]), self.lm.norm]
        kernels.begin(layers[0].attention_norm, b, p)
        for layer, gain, keys, values in zip(layers, gains, self.keys, self.values, strict=True):
            kernels.run_layer(layer, gain, keys, values, b, p)


class Recordings:
    """Launches of fixed buffers, on a GPU as CUDA graphs."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def run(self, key: Hashable, launch: Callable[[], None]) -> None:
        """The current stream must not be the default one."""
        if not self._cuda:
            launch()
            return
        if key not in self._graphs:
            self._graphs[key] = recorded(launch)
        self._graphs[key].replay()

    def clear(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()  # none may be running
        self._graphs.clear()


class FusedDecoder(BatchDecoder):
    """A `BatchDecoder` whose ids are drawn and run by the kernels, on a GPU `BURST` in one CUDA graph."""

    forward: FusedForward

    def __init__(self, forward: FusedForward, sampling: SamplingConfig, *, longest: int, burst: int = 1):
        with forward.aside():
            super().__init__(forward, sampling, longest=longest, burst=burst)
            kept = torch.zeros(forward.rows, KEPT, dtype=torch.int64, device=forward.device)
        self._draws = [
            Draws(
                self.logits, self.uniform, self.recent, self.drawn_count, self.minimum, self.maximum, self.positions,
                self.finished.view(torch.uint8), drawn, kept,
            )
            for drawn in self.drawn
        ]  # fmt: skip

    @torch.inference_mode()
    def advance(self, rows: int, span: int) -> None:
        pages = self.forward.pages_for(span)
        self.forward.recorded.run((rows, pages), partial(self._launch, rows, pages))

    def _launch(self, rows: int, pages: int) -> None:
        lm, b = self.forward.lm, self.forward.buffers
        for draws in self._draws:
            draw(
                draws, b.x, b.positions, lm.embedding, lm.scales, self.sampling, rows=rows,
                vocabulary=lm.config.speech_vocab, pdl=lm.pdl,
            )  # fmt: skip
            self.forward.run(self.logits, rows, pages)
