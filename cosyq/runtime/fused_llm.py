"""The language model for Triton's kernels: weights stacked as they are stored, keys and values in pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
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


def packed_rows(linear: nn.Module, dtype: torch.dtype) -> Packed:
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


def stack(linears: list[nn.Module], dtype: torch.dtype) -> Packed:
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


class FusedLM:
    """A language model's weights for the kernels; the model keeps views of them.

    What computes is in `FusedForward`, which any number of decoders may have one of.
    """

    def __init__(self, llm: LanguageModel, dtype: torch.dtype):
        self.config, self.dtype, self.device = llm.config, dtype, llm.norm.weight.device
        self.pdl = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (9, 0)
        self.layers = [
            Layer(
                attention_norm=layer.input_layernorm.weight.detach().float(),
                qkv=with_bias(stack([getattr(layer.self_attn, f"{name}_proj") for name in "qkv"], dtype)),
                output=packed_rows(layer.self_attn.o_proj, dtype),
                mlp_norm=layer.post_attention_layernorm.weight.detach().float(),
                gate_up=stack([layer.mlp.gate_proj, layer.mlp.up_proj], dtype),
                down=packed_rows(layer.mlp.down_proj, dtype),
            )
            for layer in llm.layers
        ]
        self.norm = llm.norm.weight.detach().float()
        self.head = packed_rows(llm.head, dtype)
        embedding = llm.speech_embedding
        packed = isinstance(embedding, PackedEmbedding)
        self.embedding: Tensor = embedding.packed["weight"] if packed else embedding.weight.detach()
        self.scales: Tensor | None = embedding.packed["SCB"] if packed else None


class FusedForward:
    """The key-value cache of `rows` utterances in pages, and the passes over it; a `runtime.forward.Forward`.

    keys, values: [layers, pages, kv_heads, PAGE, head_dim]; page 0 is nobody's: rows without an utterance write there.
    """

    def __init__(self, lm: FusedLM, *, rows: int, capacity: int):
        c, device = lm.config, lm.device
        self.lm, self.config, self.device, self.rows = lm, c, device, rows
        self.pages_a_row = -(-capacity // PAGE)
        self.capacity = self.pages_a_row * PAGE
        self._pages: list[list[int]] = [[] for _ in range(rows)]
        shape = (c.num_layers, 1 + rows * min(FIRST_PAGES, self.pages_a_row), c.num_kv_heads, PAGE, c.head_dim)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=lm.dtype) for _ in range(2))
        self._free = list(range(1, shape[1]))
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}

        def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        cos, sin = rope_tables(torch.arange(self.capacity, device=device), c.head_dim, c.rope_theta)
        half = c.head_dim // 2
        self.buffers = Buffers(
            x=floats(rows, c.hidden_size),
            q=floats(rows, c.num_heads * c.head_dim),
            parts=floats(rows, c.num_heads, self.pages_a_row, c.head_dim),
            stats=floats(rows, c.num_heads, self.pages_a_row, 2),
            inner=floats(rows, c.intermediate_size),
            positions=torch.zeros(rows, dtype=torch.int32, device=device),
            pages=torch.zeros(rows, self.pages_a_row, dtype=torch.int32, device=device),
            cos=cos[:, :half].contiguous(),
            sin=sin[:, :half].contiguous(),
        )
        self._scratch = Scratch.empty(c, rows, lm.dtype, device) if rows > 1 else None

    def reserve(self, row: int, positions: int) -> None:
        """Let the row have so many positions: pages are taken as they are needed."""
        taken = self._pages[row]
        while len(taken) * PAGE < positions:
            if not self._free:
                self._grow()
            taken.append(self._free.pop())
            self.buffers.pages[row, len(taken) - 1] = taken[-1]

    def release(self, row: int) -> None:
        """The row's pages are free; it writes to nobody's from here on."""
        self._free += self._pages[row]
        self._pages[row] = []
        self.buffers.pages[row] = 0
        self.buffers.positions[row] = 0

    def _grow(self) -> None:
        """Twice the pages. What was recorded knows the old ones."""
        pages = self.keys.shape[1]
        self.graphs.clear()
        self.keys, self.values = (torch.cat([t, torch.zeros_like(t)], dim=1) for t in (self.keys, self.values))
        self._free += range(pages, 2 * pages)

    @torch.inference_mode()
    def prefill(self, row: int, embeddings: Tensor, past: int) -> Tensor:
        lm, c, t = self.lm, self.config, embeddings.shape[1]
        self.reserve(row, past + t)
        positions = torch.arange(past, past + t, dtype=torch.int32, device=self.device)
        pages, count = self.buffers.pages[row], len(self._pages[row])
        scratch = Scratch.empty(c, t, lm.dtype, self.device)
        mask = None
        if past:
            mask = torch.ones(t, past + t, dtype=torch.bool, device=self.device).tril(past)

        def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            seen = [cache[pages[:count]].transpose(0, 1).flatten(1, 2)[None, :, : past + t] for cache in (keys, values)]
            heads = q.to(lm.dtype).view(1, t, c.num_heads, c.head_dim).transpose(1, 2)
            out = F.scaled_dot_product_attention(heads, *seen, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            return out.transpose(1, 2).reshape(t, -1)

        x = embeddings[0].float().clone()
        self._run_rows(x, positions, pages, scratch, attend)
        last = torch.empty(1, c.hidden_size, dtype=lm.dtype, device=self.device)
        kernels.norm(x[-1:], lm.norm, last, c.rms_norm_eps)
        logits = torch.empty(1, c.speech_rows, device=self.device)
        kernels.matmul(last, lm.head, logits)
        return logits[0]

    def run(self, logits: Tensor, rows: int, pages: int) -> None:
        """logits [rows, n] that follow `buffers.x` at `buffers.positions`, none beyond the row's first `pages`."""
        c, lm, b = self.config, self.lm, self.buffers
        geometry = Geometry(
            rows, c.num_heads, c.num_kv_heads, c.head_dim, self.pages_a_row, pages, c.rms_norm_eps, lm.pdl and rows == 1
        )
        if rows == 1:
            for layer, keys, values in zip(lm.layers, self.keys, self.values, strict=True):
                step.run_layer(layer, keys, values, b, geometry)
            step.run_head(lm.norm, lm.head, logits, b, geometry)
            return
        assert self._scratch is not None
        scratch = self._scratch.first(rows)

        def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            step.attend(b, keys, values, geometry)
            kernels.merge(b.parts, b.stats, b.positions, scratch.attended, rows=rows, page=PAGE)
            return scratch.attended

        self._run_rows(b.x[:rows], b.positions, b.pages, scratch, attend, q=b.q[:rows])
        kernels.norm(b.x[:rows], lm.norm, scratch.normed, c.rms_norm_eps)
        kernels.matmul(scratch.normed, lm.head, logits[:rows])

    def _run_rows(
        self,
        x: Tensor,
        positions: Tensor,
        pages: Tensor,
        scratch: Scratch,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        q: Tensor | None = None,
    ) -> None:
        """x [m, hidden] float32 after all layers, in place."""
        c, b = self.config, self.buffers
        q = scratch.q if q is None else q
        for layer, keys, values in zip(self.lm.layers, self.keys, self.values, strict=True):
            kernels.norm(x, layer.attention_norm, scratch.normed, c.rms_norm_eps)
            kernels.matmul(scratch.normed, layer.qkv, scratch.qkv)
            kernels.turn(scratch.qkv, q, keys, values, b.cos, b.sin, positions, pages, heads=c.num_heads)
            kernels.matmul(attend(q, keys, values), layer.output, x, add=True)
            kernels.norm(x, layer.mlp_norm, scratch.normed, c.rms_norm_eps)
            kernels.matmul(scratch.normed, layer.gate_up, scratch.gate_up)
            kernels.swiglu(scratch.gate_up, scratch.inner)
            kernels.matmul(scratch.inner, layer.down, x, add=True)


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
    """A `BatchDecoder` whose step is one draw and one pass by the kernels, on a GPU a CUDA graph from the second on."""

    forward: FusedForward

    def __init__(self, forward: FusedForward, sampling: SamplingConfig, *, longest: int):
        super().__init__(forward, sampling, longest=longest)
        self._draws = Draws(
            self.logits, self.uniform, self.recent, self.drawn_count, self.minimum, self.maximum, self.positions,
            self.finished.view(torch.uint8), self.drawn,
        )  # fmt: skip

    def step(self) -> None:
        for row, state in self._rows.items():
            if not state.ended:
                self.forward.reserve(row, state.reach + 1)
        super().step()

    def leave(self, row: int) -> None:
        super().leave(row)
        self.forward.release(row)

    @torch.inference_mode()
    def advance(self, rows: int, span: int) -> None:
        pages = min(max(1 << (-(-span // PAGE) - 1).bit_length(), FIRST_PAGES), self.forward.pages_a_row)
        graphs, key = self.forward.graphs, (rows, pages)
        if self.forward.device.type != "cuda":
            self._launch(rows, pages)
        elif key not in graphs:
            self._launch(rows, pages)  # compiles, or loads what was compiled
            graphs[key] = None
        else:
            graphs[key] = graph = graphs[key] or self._record(rows, pages)
            graph.replay()

    def _record(self, rows: int, pages: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._launch(rows, pages)
        return graph

    def _launch(self, rows: int, pages: int) -> None:
        lm, b = self.forward.lm, self.forward.buffers
        draw(
            self._draws, b.x, b.positions, lm.embedding, lm.scales, self.sampling, rows=rows,
            vocabulary=lm.config.speech_vocab, pdl=lm.pdl and rows == 1,
        )  # fmt: skip
        self.forward.run(self.logits, rows, pages)
