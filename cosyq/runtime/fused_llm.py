"""The language model for Triton's kernels: weights stacked as they are stored, keys and values in pages."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cosyq.kernels import decode as step
from cosyq.kernels import rows as kernels
from cosyq.kernels.decode import PAGE, Buffers, Geometry, Layer
from cosyq.kernels.draw import Draws, draw
from cosyq.kernels.packed import Packed, float_rows, four_bit_rows, int8_rows, stacked
from cosyq.model.config import LLMConfig, SamplingConfig
from cosyq.model.llm import LanguageModel, rope_tables
from cosyq.quantize.linear import DequantLinear, PackedEmbedding
from cosyq.runtime.batch import BatchDecoder

FIRST_PAGES = 4  # of a row: 512 positions, a prompt and ten seconds
CHUNK = 128  # positions of a prompt that are run at a time
PADDING = 32  # what their number is rounded up to
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
        self.recorded = Recordings(device)
        self._pages: list[list[int]] = [[] for _ in range(rows)]
        shape = (c.num_layers, 1 + rows * min(FIRST_PAGES, self.pages_a_row), c.num_kv_heads, PAGE, c.head_dim)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=lm.dtype) for _ in range(2))
        self._free = list(range(1, shape[1]))
        cos, sin = rope_tables(torch.arange(self.capacity, device=device), c.head_dim, c.rope_theta)
        half = c.head_dim // 2
        self._rope = cos[:, :half].contiguous(), sin[:, :half].contiguous()
        self.buffers = self._buffers(rows, torch.zeros(rows, self.pages_a_row, dtype=torch.int32, device=device))
        self._scratch = Scratch.empty(c, rows, lm.dtype, device)
        self._prompt = self._buffers(CHUNK, torch.zeros(self.pages_a_row, dtype=torch.int32, device=device))
        self._prompt_scratch = Scratch.empty(c, CHUNK, lm.dtype, device)
        self._prompt_end = torch.zeros(1, dtype=torch.int64, device=device)
        self._prompt_logits = torch.zeros(1, c.speech_rows, device=device)

    def _buffers(self, rows: int, pages: Tensor) -> Buffers:
        c, device, (cos, sin) = self.config, self.device, self._rope

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        return Buffers(
            x=floats(rows, c.hidden_size),
            q=floats(rows, c.num_heads * c.head_dim),
            parts=floats(rows, c.num_heads, self.pages_a_row, c.head_dim),
            stats=floats(rows, c.num_heads, self.pages_a_row, 2),
            inner=floats(rows, c.intermediate_size),
            positions=torch.full((rows,), -1, dtype=torch.int32, device=device),
            pages=pages,
            cos=cos,
            sin=sin,
        )

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
    def prefill(self, row: int, embeddings: Tensor, past: int) -> Tensor:
        """As `Forward.prefill`, in chunks: every position is a row of its own, all with one table of pages."""
        end = past + embeddings.shape[1]
        self.reserve(row, end)
        b = self._prompt
        b.pages.copy_(self.buffers.pages[row])
        for part in embeddings[0].float().split(CHUNK):
            count = len(part)
            padded = -(-count // PADDING) * PADDING
            b.x[:count] = part
            b.x[count:padded] = 0
            b.positions[:count] = torch.arange(past, past + count, device=self.device)
            b.positions[count:padded] = -1
            self._prompt_end.fill_(count - 1)
            past += count
            pages = self.pages_for(past)
            self.recorded.run(("prompt", padded, pages), partial(self._show, padded, pages))
        return self._prompt_logits[0]

    def _show(self, count: int, pages: int) -> None:
        """`count` positions of a prompt, and the logits behind the last that there is."""
        x, normed = self._prompt.x[:count], self._prompt_scratch.first(count).normed
        self._run_rows(self._prompt, self._prompt_scratch.first(count), count, pages)
        kernels.norm(x, self.lm.norm, normed, self.config.rms_norm_eps)
        kernels.matmul(normed.index_select(0, self._prompt_end), self.lm.head, self._prompt_logits)

    @torch.inference_mode()
    def __call__(self, ids: Tensor, positions: Tensor, span: int) -> Tensor:
        b, rows = self.buffers, len(ids)
        b.x[:rows], b.positions[:rows] = self.lm.embed(ids), positions
        logits = torch.empty(rows, self.config.speech_rows, device=self.device)
        self.run(logits, rows, self.pages_for(span))
        return logits

    def run(self, logits: Tensor, rows: int, pages: int) -> None:
        """logits [rows, n] that follow `buffers.x` at `buffers.positions`, none beyond the row's first `pages`."""
        lm, b = self.lm, self.buffers
        if rows == 1:
            geometry = self._geometry(rows, pages, lm.pdl)
            for layer, keys, values in zip(lm.layers, self.keys, self.values, strict=True):
                step.run_layer(layer, keys, values, b, geometry)
            step.run_head(lm.norm, lm.head, logits, b, geometry)
            return
        scratch = self._scratch.first(rows)
        self._run_rows(b, scratch, rows, pages)
        kernels.norm(b.x[:rows], lm.norm, scratch.normed, self.config.rms_norm_eps)
        kernels.matmul(scratch.normed, lm.head, logits[:rows])

    def _geometry(self, rows: int, pages: int, pdl: bool) -> Geometry:
        c = self.config
        return Geometry(rows, c.num_heads, c.num_kv_heads, c.head_dim, self.pages_a_row, pages, c.rms_norm_eps, pdl)

    def _run_rows(self, b: Buffers, scratch: Scratch, rows: int, pages: int) -> None:
        """The first rows of b.x after all layers, in place."""
        c, geometry, x, q = self.config, self._geometry(rows, pages, False), b.x[:rows], b.q[:rows]
        for layer, keys, values in zip(self.lm.layers, self.keys, self.values, strict=True):
            kernels.norm(x, layer.attention_norm, scratch.normed, c.rms_norm_eps)
            kernels.matmul(scratch.normed, layer.qkv, scratch.qkv)
            kernels.turn(scratch.qkv, q, keys, values, b.cos, b.sin, b.positions, b.pages, heads=c.num_heads)
            step.attend(q, keys, values, b.positions, b.pages, b.parts, b.stats, geometry)
            kernels.merge(b.parts, b.stats, b.positions, scratch.attended, rows=rows, page=PAGE)
            kernels.matmul(scratch.attended, layer.output, x, add=True)
            kernels.norm(x, layer.mlp_norm, scratch.normed, c.rms_norm_eps)
            kernels.matmul(scratch.normed, layer.gate_up, scratch.gate_up)
            kernels.swiglu(scratch.gate_up, scratch.inner)
            kernels.matmul(scratch.inner, layer.down, x, add=True)


class Recordings:
    """Launches of fixed buffers, on a GPU as CUDA graphs from their second time on.

    The first time compiles, or loads what was compiled; recording costs some ten milliseconds, and pays when repeated.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}

    def run(self, key: Hashable, launch: Callable[[], None]) -> None:
        if not self._cuda or key not in self._graphs:
            launch()
            self._graphs[key] = None
            return
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                launch()
        graph.replay()

    def clear(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()  # none may be running
        self._graphs.clear()


@dataclass(frozen=True)
class Scratch:
    """Between the kernels for m rows: normed, attended and inner in the products' dtype, the others float32."""

    normed: Tensor
    qkv: Tensor
    q: Tensor
    attended: Tensor
    gate_up: Tensor
    inner: Tensor

    @classmethod
    def empty(cls, c: LLMConfig, m: int, dtype: torch.dtype, device: torch.device) -> Scratch:
        heads = c.num_heads * c.head_dim
        return cls(
            torch.empty(m, c.hidden_size, dtype=dtype, device=device),
            torch.empty(m, heads + 2 * c.num_kv_heads * c.head_dim, device=device),
            torch.empty(m, heads, device=device),
            torch.empty(m, heads, dtype=dtype, device=device),
            torch.empty(m, 2 * c.intermediate_size, device=device),
            torch.empty(m, c.intermediate_size, dtype=dtype, device=device),
        )

    def first(self, rows: int) -> Scratch:
        return Scratch(*(getattr(self, field.name)[:rows] for field in fields(self)))


class FusedDecoder(BatchDecoder):
    """A `BatchDecoder` whose ids are drawn and run by the kernels, on a GPU `BURST` in one CUDA graph."""

    forward: FusedForward

    def __init__(self, forward: FusedForward, sampling: SamplingConfig, *, longest: int, burst: int = 1):
        super().__init__(forward, sampling, longest=longest, burst=burst)
        self._draws = [
            Draws(
                self.logits, self.uniform, self.recent, self.drawn_count, self.minimum, self.maximum, self.positions,
                self.finished.view(torch.uint8), drawn,
            )
            for drawn in self.drawn
        ]  # fmt: skip

    def step(self) -> None:
        for row, state in self._rows.items():
            if not state.ended:
                self.forward.reserve(row, state.reach + self.burst)
        super().step()

    def leave(self, row: int) -> None:
        super().leave(row)
        self.forward.release(row)

    @torch.inference_mode()
    def advance(self, rows: int, span: int) -> None:
        pages = self.forward.pages_for(span)
        self.forward.recorded.run((rows, pages), partial(self._launch, rows, pages))

    def _launch(self, rows: int, pages: int) -> None:
        lm, b = self.forward.lm, self.forward.buffers
        for draws in self._draws:
            draw(
                draws, b.x, b.positions, lm.embedding, lm.scales, self.sampling, rows=rows,
                vocabulary=lm.config.speech_vocab, pdl=lm.pdl and rows == 1,
            )  # fmt: skip
            self.forward.run(self.logits, rows, pages)
