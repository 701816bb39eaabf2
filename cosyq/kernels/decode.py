"""One decode step of the language model: five kernels a layer, each reading every weight that it needs once.

Keys and values lie in pages that a row's table names; a row that has nothing to say is at position -1 and writes to
page 0, which is nobody's. All activations between kernels are float32.

A step is bound by the bytes of the weights and by the launches. So norms, rotation, SwiGLU and residual sums happen
where their inputs are read; and with programmatic dependent launch a kernel fetches its weights while the one before it
still computes: only behind `_wait` may anything be read that another kernel wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from cosyq.kernels.packed import INT8, Packed, columns, decode, fetch, launch_sizes, multiply, product

PAGE = 128  # positions


@triton.jit
def _wait(PDL: tl.constexpr):
    if PDL:
        gdc_wait()


@triton.jit
def _let_next_start(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()


@triton.jit
def _root_mean_square(x_ptr, eps, K: tl.constexpr, PADDED: tl.constexpr):
    """1 / the root of the mean square of x [K]."""
    k = tl.arange(0, PADDED)
    x = tl.load(x_ptr + k, mask=k < K, other=0.0)
    return tl.rsqrt(tl.sum(x * x, 0) / K + eps)


@triton.jit
def _qkv(x_ptr, gain_ptr, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, bias_ptr, cos_ptr, sin_ptr, position_ptr,
         page_ptr, q_ptr, key_ptr, value_ptr, eps,
         pages_a_row: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
         LOOKUP: tl.constexpr,
         FIRST: tl.constexpr, REST: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
         DIM: tl.constexpr, PAIRS: tl.constexpr, PAGE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    half: tl.constexpr = DIM // 2
    pid = tl.program_id(0)
    head = pid // (half // PAIRS)
    pair = (pid % (half // PAIRS)) * PAIRS + tl.arange(0, PAIRS)
    upper, lower = head * DIM + pair, head * DIM + half + pair  # the rows that turn together
    valid = pair < half
    a1, as1 = fetch(w_ptr, scale_ptr, group_ptr, code_ptr, upper, valid, 0, FIRST, K, KIND, BLOCK)
    b1, bs1 = fetch(w_ptr, scale_ptr, group_ptr, code_ptr, lower, valid, 0, FIRST, K, KIND, BLOCK)
    if REST > 0:
        a2, as2 = fetch(w_ptr, scale_ptr, group_ptr, code_ptr, upper, valid, FIRST, REST, K, KIND, BLOCK)
        b2, bs2 = fetch(w_ptr, scale_ptr, group_ptr, code_ptr, lower, valid, FIRST, REST, K, KIND, BLOCK)
    upper_bias, lower_bias = tl.load(bias_ptr + upper), tl.load(bias_ptr + lower)
    _let_next_start(PDL)
    a1h, a1l = decode(a1, table_ptr, KIND, LOOKUP)
    b1h, b1l = decode(b1, table_ptr, KIND, LOOKUP)
    if REST > 0:
        a2h, a2l = decode(a2, table_ptr, KIND, LOOKUP)
        b2h, b2l = decode(b2, table_ptr, KIND, LOOKUP)
    _wait(PDL)
    for row in range(ROWS):
        x = x_ptr + row * K
        one = multiply(a1h, a1l, as1, x, gain_ptr, 0, FIRST, K, KIND, BLOCK, True)
        two = multiply(b1h, b1l, bs1, x, gain_ptr, 0, FIRST, K, KIND, BLOCK, True)
        if REST > 0:
            one += multiply(a2h, a2l, as2, x, gain_ptr, FIRST, REST, K, KIND, BLOCK, True)
            two += multiply(b2h, b2l, bs2, x, gain_ptr, FIRST, REST, K, KIND, BLOCK, True)
        r = _root_mean_square(x, eps, K, PADDED)
        one = one * r + upper_bias
        two = two * r + lower_bias
        place = tl.load(position_ptr + row)
        position = tl.maximum(place, 0)
        if head < HEADS + KV_HEADS:
            cos = tl.load(cos_ptr + position * half + pair)
            sin = tl.load(sin_ptr + position * half + pair)
            turned = one * cos - two * sin
            two = two * cos + one * sin
            one = turned
        if head < HEADS:
            q = q_ptr + (row * HEADS + head) * DIM
            tl.store(q + pair, one)
            tl.store(q + half + pair, two)
        else:
            page = tl.load(page_ptr + row * pages_a_row + position // PAGE, mask=place >= 0, other=0).to(tl.int64)
            cache = key_ptr if head < HEADS + KV_HEADS else value_ptr
            kv_head = (head - HEADS) % KV_HEADS
            to = cache + ((page * KV_HEADS + kv_head) * PAGE + position % PAGE) * DIM
            tl.store(to + pair, one.to(key_ptr.dtype.element_ty))
            tl.store(to + half + pair, two.to(key_ptr.dtype.element_ty))


@triton.jit
def _attend(q_ptr, key_ptr, value_ptr, position_ptr, page_ptr, page_stride, out_ptr, stat_ptr, softmax_scale,
            pages_a_row: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
            PAGE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One page for one head of one row: its part of the sum, its largest score and its sum of weights.

    The heads of a group read the same keys and values, all but one of them from the cache of the chip.
    """
    row, head, number = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_head = head // (HEADS // KV_HEADS)
    _let_next_start(PDL)
    _wait(PDL)
    position = tl.load(position_ptr + row)
    if number * PAGE <= position:
        page = tl.load(page_ptr + row * page_stride + number).to(tl.int64)
        at, d = tl.arange(0, PAGE), tl.arange(0, DIM)
        tile = (page * KV_HEADS + kv_head) * PAGE * DIM + at[:, None] * DIM + d[None, :]
        seen = number * PAGE + at <= position
        keys = tl.load(key_ptr + tile, mask=seen[:, None], other=0.0).to(tl.float32)
        values = tl.load(value_ptr + tile, mask=seen[:, None], other=0.0).to(tl.float32)
        q = tl.load(q_ptr + (row * HEADS + head) * DIM + d)
        scores = tl.where(seen, tl.sum(keys * q[None, :], 1) * softmax_scale, float("-inf"))
        largest = tl.max(scores, 0)
        weights = tl.exp(scores - largest)
        part = (row * HEADS + head) * pages_a_row + number
        tl.store(out_ptr + part * DIM + d, tl.sum(weights[:, None] * values, 0))
        tl.store(stat_ptr + part * 2, largest)
        tl.store(stat_ptr + part * 2 + 1, tl.sum(weights, 0))


@triton.jit
def _attended(k, inside, part_ptr, stat_ptr, count, pages_a_row: tl.constexpr, DIM: tl.constexpr):
    """Channels k of one row's attention: the parts of its pages as one softmax."""
    first, d = (k // DIM) * pages_a_row, k % DIM
    largest = tl.load(stat_ptr + first * 2, mask=inside, other=0.0)
    total = tl.load(stat_ptr + first * 2 + 1, mask=inside, other=1.0)
    out = tl.load(part_ptr + first * DIM + d, mask=inside, other=0.0)
    number = 1
    while number < count:
        part = first + number
        other = tl.load(stat_ptr + part * 2, mask=inside, other=0.0)
        both = tl.maximum(largest, other)
        mine, its = tl.exp(largest - both), tl.exp(other - both)
        out = out * mine + tl.load(part_ptr + part * DIM + d, mask=inside, other=0.0) * its
        total = total * mine + tl.load(stat_ptr + part * 2 + 1, mask=inside, other=0.0) * its
        largest = both
        number += 1
    return out / total


@triton.jit
def _attended_product(high, low, scales, part_ptr, stat_ptr, count, pages_a_row: tl.constexpr, k0: tl.constexpr,
                      WIDTH: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
                      DIM: tl.constexpr):  # fmt: skip
    k, next_k = columns(k0, WIDTH, KIND, BLOCK)
    even = _attended(k, k < K, part_ptr, stat_ptr, count, pages_a_row, DIM)
    odd = even
    if (KIND == 1) or (KIND == 2):
        odd = _attended(next_k, next_k < K, part_ptr, stat_ptr, count, pages_a_row, DIM)
    return product(high, low, scales, even, odd, KIND)


@triton.jit
def _output(part_ptr, stat_ptr, position_ptr, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, x_ptr,
            pages_a_row: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr,
            BLOCK: tl.constexpr, LOOKUP: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
            HEADS: tl.constexpr, DIM: tl.constexpr,
            PAGE: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """What the heads attended to, projected, added to x."""
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = n < N
    a1, as1 = fetch(w_ptr, scale_ptr, group_ptr, code_ptr, n, valid, 0, FIRST, K, KIND, BLOCK)
    if REST > 0:
        a2, as2 = fetch(w_ptr, scale_ptr, group_ptr, code_ptr, n, valid, FIRST, REST, K, KIND, BLOCK)
    _let_next_start(PDL)
    a1h, a1l = decode(a1, table_ptr, KIND, LOOKUP)
    if REST > 0:
        a2h, a2l = decode(a2, table_ptr, KIND, LOOKUP)
    _wait(PDL)
    for row in range(ROWS):
        count = tl.maximum(tl.load(position_ptr + row), 0) // PAGE + 1
        parts, stats = part_ptr + row * HEADS * pages_a_row * DIM, stat_ptr + row * HEADS * pages_a_row * 2
        out = _attended_product(a1h, a1l, as1, parts, stats, count, pages_a_row, 0, FIRST, K, KIND, BLOCK, DIM)
        if REST > 0:
            out += _attended_product(a2h, a2l, as2, parts, stats, count, pages_a_row, FIRST, REST, K, KIND, BLOCK, DIM)
        to = x_ptr + row * N + n
        tl.store(to, tl.load(to, mask=valid, other=0.0) + out, mask=valid)


@triton.jit
def _swiglu(x_ptr, gain_ptr, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, out_ptr, eps,
            N: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
         LOOKUP: tl.constexpr,
            FIRST: tl.constexpr, REST: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """silu(gate) * up of the normed x, [ROWS, N]; the weight's first N rows are the gate's."""
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = n < N
    a1, as1 = fetch(w_ptr, scale_ptr, group_ptr, code_ptr, n, valid, 0, FIRST, K, KIND, BLOCK)
    b1, bs1 = fetch(w_ptr, scale_ptr, group_ptr, code_ptr, N + n, valid, 0, FIRST, K, KIND, BLOCK)
    if REST > 0:
        a2, as2 = fetch(w_ptr, scale_ptr, group_ptr, code_ptr, n, valid, FIRST, REST, K, KIND, BLOCK)
        b2, bs2 = fetch(w_ptr, scale_ptr, group_ptr, code_ptr, N + n, valid, FIRST, REST, K, KIND, BLOCK)
    _let_next_start(PDL)
    a1h, a1l = decode(a1, table_ptr, KIND, LOOKUP)
    b1h, b1l = decode(b1, table_ptr, KIND, LOOKUP)
    if REST > 0:
        a2h, a2l = decode(a2, table_ptr, KIND, LOOKUP)
        b2h, b2l = decode(b2, table_ptr, KIND, LOOKUP)
    _wait(PDL)
    for row in range(ROWS):
        x = x_ptr + row * K
        gate = multiply(a1h, a1l, as1, x, gain_ptr, 0, FIRST, K, KIND, BLOCK, True)
        up = multiply(b1h, b1l, bs1, x, gain_ptr, 0, FIRST, K, KIND, BLOCK, True)
        if REST > 0:
            gate += multiply(a2h, a2l, as2, x, gain_ptr, FIRST, REST, K, KIND, BLOCK, True)
            up += multiply(b2h, b2l, bs2, x, gain_ptr, FIRST, REST, K, KIND, BLOCK, True)
        r = _root_mean_square(x, eps, K, PADDED)
        gate *= r
        tl.store(out_ptr + row * N + n, gate / (1 + tl.exp(-gate)) * up * r, mask=valid)


@triton.jit
def _linear(x_ptr, gain_ptr, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, out_ptr, eps,
            N: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
         LOOKUP: tl.constexpr,
            FIRST: tl.constexpr, REST: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, NORM: tl.constexpr,
            ADD: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """x [ROWS, K], normed or not, times the weight: stored to out [ROWS, N], or added to it."""
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = n < N
    a1, as1 = fetch(w_ptr, scale_ptr, group_ptr, code_ptr, n, valid, 0, FIRST, K, KIND, BLOCK)
    if REST > 0:
        a2, as2 = fetch(w_ptr, scale_ptr, group_ptr, code_ptr, n, valid, FIRST, REST, K, KIND, BLOCK)
    _let_next_start(PDL)
    a1h, a1l = decode(a1, table_ptr, KIND, LOOKUP)
    if REST > 0:
        a2h, a2l = decode(a2, table_ptr, KIND, LOOKUP)
    _wait(PDL)
    for row in range(ROWS):
        x = x_ptr + row * K
        out = multiply(a1h, a1l, as1, x, gain_ptr, 0, FIRST, K, KIND, BLOCK, NORM)
        if REST > 0:
            out += multiply(a2h, a2l, as2, x, gain_ptr, FIRST, REST, K, KIND, BLOCK, NORM)
        if NORM:
            out *= _root_mean_square(x, eps, K, PADDED)
        to = out_ptr + row * N + n
        if ADD:
            out += tl.load(to, mask=valid, other=0.0)
        tl.store(to, out, mask=valid)


@dataclass(frozen=True)
class Tiles:
    """How many rows of weights a program takes, and with how many warps."""

    qkv: tuple[int, int]  # pairs of rows
    output: tuple[int, int]
    swiglu: tuple[int, int]  # pairs of rows
    down: tuple[int, int]
    head: tuple[int, int]


# Measured on an H100 (docs/speed.md).
INT8_TILES = Tiles(qkv=(8, 8), output=(8, 8), swiglu=(8, 4), down=(4, 8), head=(16, 4))
OTHER_TILES = Tiles(qkv=(4, 2), output=(8, 4), swiglu=(8, 4), down=(4, 8), head=(16, 4))


@dataclass(frozen=True)
class Geometry:
    """What the kernels of a step have to agree on. Of a row's `pages_a_row` only `pages` are in use."""

    rows: int
    heads: int
    kv_heads: int
    dim: int
    pages_a_row: int
    pages: int
    eps: float
    pdl: bool

    def launch(self, warps: int) -> dict[str, Any]:
        return {"PDL": self.pdl, "num_warps": warps} | ({"launch_pdl": True} if self.pdl else {})


@dataclass(frozen=True)
class Buffers:
    """Between the kernels, float32: x [rows, hidden]; q [rows, heads * dim]; parts [rows, heads, pages, dim] with
    stats [rows, heads, pages, 2]; inner [rows, intermediate]. positions int32 [rows], pages int32 [rows, pages_a_row];
    cos and sin [positions, dim / 2]."""

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


def attend(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, pages: Tensor, parts: Tensor, stats: Tensor,
    g: Geometry,
) -> None:  # fmt: skip
    """`parts` and `stats` of the rows' queries over the pages up to their positions; see `Buffers`.

    pages: the rows' tables [rows, pages_a_row], or one table [pages_a_row] for all of them.
    """
    stride = pages.stride(0) if pages.dim() == 2 else 0
    _attend[(g.rows, g.heads, g.pages)](
        q, keys, values, positions, pages, stride, parts, stats, g.dim**-0.5, pages_a_row=g.pages_a_row,
        HEADS=g.heads, KV_HEADS=g.kv_heads, DIM=g.dim, PAGE=PAGE, **g.launch(4),
    )  # fmt: skip


def run_layer(layer: Layer, keys: Tensor, values: Tensor, b: Buffers, g: Geometry) -> None:
    """x after one layer, in place; keys and values [pages, kv_heads, PAGE, dim] gain the rows' positions."""
    t, width = _tiles(layer.gate_up), triton.next_power_of_2(b.x.shape[1])
    half = g.dim // 2
    pairs = min(t.qkv[0], half)
    _qkv[((g.heads + 2 * g.kv_heads) * (half // pairs),)](
        b.x, layer.attention_norm, *layer.qkv.pointers, layer.qkv.bias, b.cos, b.sin, b.positions, b.pages,
        b.q, keys, values, g.eps, pages_a_row=g.pages_a_row, PADDED=width, HEADS=g.heads, KV_HEADS=g.kv_heads,
        DIM=g.dim, PAIRS=pairs, PAGE=PAGE, ROWS=g.rows, **launch_sizes(layer.qkv), **g.launch(t.qkv[1]),
    )  # fmt: skip
    attend(b.q, keys, values, b.positions, b.pages, b.parts, b.stats, g)
    _output[(triton.cdiv(layer.output.n, t.output[0]),)](
        b.parts, b.stats, b.positions, *layer.output.pointers, b.x, pages_a_row=g.pages_a_row, N=layer.output.n,
        HEADS=g.heads, DIM=g.dim, PAGE=PAGE, TILE=t.output[0], ROWS=g.rows, **launch_sizes(layer.output),
        **g.launch(t.output[1]),
    )  # fmt: skip
    inner = layer.gate_up.n // 2
    _swiglu[(triton.cdiv(inner, t.swiglu[0]),)](
        b.x, layer.mlp_norm, *layer.gate_up.pointers, b.inner, g.eps, N=inner, PADDED=width, TILE=t.swiglu[0],
        ROWS=g.rows, **launch_sizes(layer.gate_up), **g.launch(t.swiglu[1]),
    )  # fmt: skip
    _linear[(triton.cdiv(layer.down.n, t.down[0]),)](
        b.inner, layer.mlp_norm, *layer.down.pointers, b.x, g.eps, N=layer.down.n, PADDED=width, TILE=t.down[0],
        NORM=False, ADD=True, ROWS=g.rows, **launch_sizes(layer.down), **g.launch(t.down[1]),
    )  # fmt: skip


def run_head(norm: Tensor, head: Packed, logits: Tensor, b: Buffers, g: Geometry) -> None:
    """logits [rows, n] float32 of the normed x."""
    rows, warps = _tiles(head).head
    _linear[(triton.cdiv(head.n, rows),)](
        b.x, norm, *head.pointers, logits, g.eps, N=head.n, PADDED=triton.next_power_of_2(b.x.shape[1]),
        TILE=rows, NORM=True, ADD=False, ROWS=g.rows, **launch_sizes(head), **g.launch(warps),
    )  # fmt: skip


def _tiles(packed: Packed) -> Tiles:
    return INT8_TILES if packed.kind == INT8.value else OTHER_TILES
