"""One decode step of the language model: five kernels a layer, each reading every weight that it needs once.

Keys and values lie in pages that a row's table names; a row that has nothing to say is at position -1 and writes to
page 0, which is nobody's. All activations between kernels are float32.

A step is bound by the bytes of the weights, by the launches and by what decoding costs. So norms, rotation, SwiGLU and
residual sums happen where their inputs are read; with programmatic dependent launch a kernel fetches its weights while
the one before it still computes (only behind `wait` may anything be read that it wrote); and codes are not
decoded but multiplied as integers, by inputs as two signed bytes: 15 bits and a sign, of the largest input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from cosyq.kernels.decode_products import Heads, fetched, inputs_of, matrix, times
from cosyq.kernels.overlap import let_next_start, wait
from cosyq.kernels.packed import Packed

PAGE = 128  # positions


@triton.jit
def _root_mean_square(x_ptr, eps, K: tl.constexpr, PADDED: tl.constexpr):
    """1 / the root of the mean square of x [K]."""
    k = tl.arange(0, PADDED)
    x = tl.load(x_ptr + k, mask=k < K, other=0.0)
    return tl.rsqrt(tl.sum(x * x, 0) / K + eps)


@triton.jit
def _rows(W: tl.constexpr):
    n = tl.program_id(0) * W.tile + tl.arange(0, W.tile)
    return n, n < W.n


@triton.jit
def _qkv(x_ptr, gain_ptr, w, bias_ptr, cos_ptr, sin_ptr, position_ptr, page_ptr, q_ptr, key_ptr, value_ptr, eps,
         W: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Normed x projected; queries and keys turned by their position, keys and values written to their page."""
    half: tl.constexpr = H.dim // 2
    pid = tl.program_id(0)
    head = pid // (half // W.tile)
    pair = (pid % (half // W.tile)) * W.tile + tl.arange(0, W.tile)
    upper = head * H.dim + pair  # and `half` below it the rows that they turn with
    upper_tile = fetched(w, upper, pair < half, W)
    lower_tile = fetched(w, upper + half, pair < half, W)
    upper_bias, lower_bias = tl.load(bias_ptr + upper), tl.load(bias_ptr + upper + half)
    wait(PDL)
    let_next_start(PDL)
    place = tl.load(position_ptr)
    position = tl.maximum(place, 0)
    r = _root_mean_square(x_ptr, eps, W.k, PADDED)
    inputs = inputs_of((x_ptr, gain_ptr), W)
    one = times(upper_tile, inputs, w[2], W) * r + upper_bias
    two = times(lower_tile, inputs, w[2], W) * r + lower_bias
    if head < H.query + H.kv:
        cos = tl.load(cos_ptr + position * half + pair)
        sin = tl.load(sin_ptr + position * half + pair)
        turned = one * cos - two * sin
        two = two * cos + one * sin
        one = turned
    if head < H.query:
        tl.store(q_ptr + upper, one)
        tl.store(q_ptr + upper + half, two)
    else:
        page = tl.load(page_ptr + position // H.page, mask=place >= 0, other=0).to(tl.int64)
        cache = key_ptr if head < H.query + H.kv else value_ptr
        kv_head = (head - H.query) % H.kv
        to = cache + ((page * H.kv + kv_head) * H.page + position % H.page) * H.dim + pair
        tl.store(to, one.to(key_ptr.dtype.element_ty))
        tl.store(to + half, two.to(key_ptr.dtype.element_ty))


@triton.jit
def _attend(q_ptr, key_ptr, value_ptr, position_ptr, page_ptr, out_ptr, stat_ptr, softmax_scale, H: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """One page for one head: its part of the sum, its largest score and its sum of weights.

    The heads of a group read the same keys and values, all but one of them from the cache of the chip. All positions
    but the last were there before the kernel in front began, and are fetched while that one runs.
    """
    head, number = tl.program_id(0), tl.program_id(1)
    kv_head = head // (H.query // H.kv)
    position = tl.load(position_ptr, cache_modifier=".cg")
    page = tl.load(page_ptr + number, mask=number * H.page <= position, other=0).to(tl.int64)
    at, d = tl.arange(0, H.page), tl.arange(0, H.dim)
    first = (page * H.kv + kv_head) * H.page * H.dim
    tile = first + at[:, None] * H.dim + d[None, :]
    past = (number * H.page + at < position)[:, None]
    past_keys = tl.load(key_ptr + tile, mask=past, other=0.0, cache_modifier=".cg")
    past_values = tl.load(value_ptr + tile, mask=past, other=0.0, cache_modifier=".cg")
    wait(PDL)
    let_next_start(PDL)
    if number * H.page <= position:
        q = tl.load(q_ptr + head * H.dim + d)
        new = first + tl.minimum(position - number * H.page, H.page - 1) * H.dim + d
        here, seen = (number * H.page + at == position)[:, None], number * H.page + at <= position
        keys = tl.where(here, tl.load(key_ptr + new)[None, :], past_keys).to(tl.float32)
        values = tl.where(here, tl.load(value_ptr + new)[None, :], past_values).to(tl.float32)
        scores = tl.where(seen, tl.sum(keys * q[None, :], 1) * softmax_scale, float("-inf"))
        largest = tl.max(scores, 0)
        weights = tl.exp(scores - largest)
        part = head * H.pages_a_row + number
        tl.store(out_ptr + part * H.dim + d, tl.sum(weights[:, None] * values, 0))
        tl.store(stat_ptr + part * 2, largest)
        tl.store(stat_ptr + part * 2 + 1, tl.sum(weights, 0))


@triton.jit
def _output(part_ptr, stat_ptr, position_ptr, w, x_ptr, W: tl.constexpr, H: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """What the heads attended to, projected, added to x."""
    n, valid = _rows(W)
    tile = fetched(w, n, valid, W)
    wait(PDL)
    let_next_start(PDL)
    count = tl.maximum(tl.load(position_ptr), 0) // H.page + 1
    out = times(tile, inputs_of((part_ptr, stat_ptr, count), W, H), w[2], W)
    tl.store(x_ptr + n, tl.load(x_ptr + n, mask=valid, other=0.0) + out, mask=valid)


@triton.jit
def _swiglu(x_ptr, gain_ptr, w, out_ptr, eps, W: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr):
    """silu(gate) * up of the normed x; the weight's first half of rows is the gate's."""
    half: tl.constexpr = W.n // 2
    n = tl.program_id(0) * W.tile + tl.arange(0, W.tile)
    valid = n < half
    gate_tile, up_tile = fetched(w, n, valid, W), fetched(w, half + n, valid, W)
    wait(PDL)
    let_next_start(PDL)
    r = _root_mean_square(x_ptr, eps, W.k, PADDED)
    inputs = inputs_of((x_ptr, gain_ptr), W)
    gate = times(gate_tile, inputs, w[2], W) * r
    up = times(up_tile, inputs, w[2], W) * r
    tl.store(out_ptr + n, gate / (1 + tl.exp(-gate)) * up, mask=valid)


@triton.jit
def _down(inner_ptr, w, x_ptr, W: tl.constexpr, PDL: tl.constexpr):
    """What SwiGLU left, projected, added to x."""
    n, valid = _rows(W)
    tile = fetched(w, n, valid, W)
    wait(PDL)
    let_next_start(PDL)
    out = times(tile, inputs_of((inner_ptr,), W), w[2], W)
    tl.store(x_ptr + n, tl.load(x_ptr + n, mask=valid, other=0.0) + out, mask=valid)


@triton.jit
def _head(x_ptr, gain_ptr, w, out_ptr, eps, W: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr):
    """The normed x times the weight."""
    n, valid = _rows(W)
    tile = fetched(w, n, valid, W)
    wait(PDL)
    let_next_start(PDL)
    out = times(tile, inputs_of((x_ptr, gain_ptr), W), w[2], W) * _root_mean_square(x_ptr, eps, W.k, PADDED)
    tl.store(out_ptr + n, out, mask=valid)


@dataclass(frozen=True)
class Tiles:
    """How many rows of weights a program takes, and with how many warps."""

    qkv: tuple[int, int]  # pairs of rows
    output: tuple[int, int]
    swiglu: tuple[int, int]  # pairs of rows
    down: tuple[int, int]
    head: tuple[int, int]


# The best of three that were tried on an H100 (docs/speed.md).
TILES = Tiles(qkv=(8, 4), output=(8, 4), swiglu=(8, 4), down=(8, 8), head=(16, 4))


@dataclass(frozen=True)
class Geometry:
    """What the kernels of a step have to agree on. Of the row's `pages_a_row` only `pages` are in use."""

    heads: int
    kv_heads: int
    dim: int
    pages_a_row: int
    pages: int
    eps: float
    pdl: bool

    @property
    def sizes(self) -> Heads:
        return Heads(self.heads, self.kv_heads, self.dim, self.pages_a_row, PAGE)

    def launch(self, warps: int) -> dict[str, Any]:
        return {"PDL": self.pdl, "num_warps": warps} | ({"launch_pdl": True} if self.pdl else {})


@dataclass(frozen=True)
class Buffers:
    """Between the kernels, float32: x [1, hidden]; q [heads * dim]; parts [heads, pages_a_row, dim] with stats
    [heads, pages_a_row, 2]; inner [intermediate]. positions int32 [1], pages int32 [1, pages_a_row]; cos and sin
    [positions, dim / 2]. Of x, positions and pages there may be further rows, which are left alone."""

    x: Tensor
    q: Tensor
    parts: Tensor
    stats: Tensor
    inner: Tensor
    positions: Tensor
    pages: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Layer:
    """One layer's weights: its norms' gains, float32 [hidden], and its products."""

    attention_norm: Tensor
    qkv: Packed
    output: Packed
    mlp_norm: Tensor
    gate_up: Packed
    down: Packed


def run_layer(layer: Layer, keys: Tensor, values: Tensor, b: Buffers, g: Geometry) -> None:
    """x of one row after one layer, in place; keys and values [pages, kv_heads, PAGE, dim] gain the row's position."""
    t, width = TILES, triton.next_power_of_2(b.x.shape[1])
    half = g.dim // 2
    pairs = min(t.qkv[0], half)
    _qkv[((g.heads + 2 * g.kv_heads) * (half // pairs),)](
        b.x, layer.attention_norm, layer.qkv.pointers, layer.qkv.bias, b.cos, b.sin, b.positions, b.pages,
        b.q, keys, values, g.eps, W=matrix(layer.qkv, pairs), H=g.sizes, PADDED=width, **g.launch(t.qkv[1]),
    )  # fmt: skip
    _attend[(g.heads, g.pages)](
        b.q, keys, values, b.positions, b.pages, b.parts, b.stats, g.dim**-0.5, H=g.sizes, **g.launch(4)
    )
    _output[(triton.cdiv(layer.output.n, t.output[0]),)](
        b.parts, b.stats, b.positions, layer.output.pointers, b.x, W=matrix(layer.output, t.output[0]), H=g.sizes,
        **g.launch(t.output[1]),
    )  # fmt: skip
    _swiglu[(triton.cdiv(layer.gate_up.n // 2, t.swiglu[0]),)](
        b.x, layer.mlp_norm, layer.gate_up.pointers, b.inner, g.eps, W=matrix(layer.gate_up, t.swiglu[0]),
        PADDED=width, **g.launch(t.swiglu[1]),
    )  # fmt: skip
    _down[(triton.cdiv(layer.down.n, t.down[0]),)](
        b.inner, layer.down.pointers, b.x, W=matrix(layer.down, t.down[0]), **g.launch(t.down[1])
    )


def run_head(norm: Tensor, head: Packed, logits: Tensor, b: Buffers, g: Geometry) -> None:
    """logits [1, n] float32 of the normed x."""
    rows, warps = TILES.head
    _head[(triton.cdiv(head.n, rows),)](
        b.x, norm, head.pointers, logits, g.eps, W=matrix(head, rows), PADDED=triton.next_power_of_2(b.x.shape[1]),
        **g.launch(warps),
    )  # fmt: skip
