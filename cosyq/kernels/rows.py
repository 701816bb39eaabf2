"""The language model over several rows at once: utterances of a batch, or positions of prompts.

Five kernels a layer, each reading every packed weight that it needs once for a tile of rows, on tensor cores. A product
that ends a part of a layer adds to x, and leaves for the next one what a norm needs: x times its gain, in the products'
type, and the sum of squares of every tile, from which the next one makes the factor of a row. So no norm is a kernel,
and none reads all of x. With programmatic dependent launch a kernel has its weights brought to the cache of the chip
while the one before it still computes: only behind `_wait` may anything be read that another kernel wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosyq.kernels.decode import PAGE, Layer, _let_next_start, _wait
from cosyq.kernels.packed import FLOAT, INT8, INT8_STEP, NESTED_BLOCKS, Packed, decode

DOT_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
TOGETHER = 16  # positions of one prompt that attend together: prompts begin at multiples of it
GAINED = tl.constexpr(1 / 64)  # x times a gain is kept so much smaller, which a float16 needs


@triton.jit
def _prefetch(w_ptr, n, first, LINES: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr):
    """Have `LINES` of 128 bytes from column `first` on of the rows n come to the second-level cache."""
    if PDL:
        part: tl.constexpr = 2 if (KIND == 1) or (KIND == 2) else 1
        a_line: tl.constexpr = 128 * 8 // w_ptr.dtype.element_ty.primitive_bitwidth
        at = tl.minimum(first // part + tl.arange(0, LINES) * a_line, K // part - 1)
        address = w_ptr + n.to(tl.int64)[:, None] * (K // part) + at[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address.to(tl.int64)], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip


@triton.jit
def _absmax(scale_ptr, n, k0, BK: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Of rows n and the blocks from column k0 on: what the artifact holds of their scales."""
    blocks: tl.constexpr = BK // BLOCK if BK > BLOCK else 1
    block = tl.minimum(k0 // BLOCK + tl.arange(0, blocks), K // BLOCK - 1)
    index = n.to(tl.int64)[:, None] * (K // BLOCK) + block[None, :]
    return tl.load(scale_ptr + index), index // NESTED_BLOCKS


@triton.jit
def _scales(absmax, group, group_ptr, code_ptr, KIND: tl.constexpr):
    if KIND == 2:
        return tl.load(code_ptr + absmax.to(tl.int32)) * tl.load(group_ptr + group * 2) + tl.load(
            group_ptr + group * 2 + 1
        )
    else:
        return absmax


@triton.jit
def _accumulate(x_ptr, at, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, n, first, SPAN: tl.constexpr,
                K: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, LOOKUP: tl.constexpr, DOT: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Rows `at` of x [m, K] times rows n of the weights over columns first .. first + SPAN: [BM, BN] float32."""
    total = tl.zeros((BM, BN), tl.float32)
    if (KIND == 0) or (KIND == 3):
        for k0 in range(0, SPAN, BK):
            k = first + k0 + tl.arange(0, BK)
            xs, ws = x_ptr + at[:, None] * K + k[None, :], w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
            if K % SPAN == 0:
                x, w = tl.load(xs), tl.load(ws)
            else:
                x, w = tl.load(xs, mask=(k < K)[None, :], other=0.0), tl.load(ws, mask=(k < K)[None, :], other=0)
            total = tl.dot(x, tl.trans(w.to(DOT)), total, input_precision="ieee")
        if KIND == 0:
            total *= (tl.load(scale_ptr + n) * INT8_STEP)[None, :]
    else:
        blocks: tl.constexpr = BK // BLOCK if BK > BLOCK else 1
        # Scales are fetched two turns ahead: the second of their loads waits for the first.
        absmax, group = _absmax(scale_ptr, n, first, BK, K, BLOCK)
        scales = _scales(absmax, group, group_ptr, code_ptr, KIND)
        absmax, group = _absmax(scale_ptr, n, first + BK, BK, K, BLOCK)
        for k0 in range(0, SPAN, BK):
            k, byte = first + k0 + tl.arange(0, BK), (first + k0) // 2 + tl.arange(0, BK // 2)
            xs = x_ptr + at[:, None] * K + k[None, :]
            ws = w_ptr + n.to(tl.int64)[:, None] * (K // 2) + byte[None, :]
            if K % SPAN == 0:
                x, codes = tl.load(xs), tl.load(ws)
            else:
                x = tl.load(xs, mask=(k < K)[None, :], other=0.0)
                codes = tl.load(ws, mask=(byte < K // 2)[None, :], other=0)
            here = tl.reshape(tl.broadcast_to(scales[:, :, None], (BN, blocks, BK // 2 // blocks)), (BN, BK // 2))
            scales = _scales(absmax, group, group_ptr, code_ptr, KIND)
            absmax, group = _absmax(scale_ptr, n, first + k0 + 2 * BK, BK, K, BLOCK)
            high, low = decode(codes, table_ptr, KIND, LOOKUP)
            w = tl.reshape(tl.join((high * here).to(DOT), (low * here).to(DOT)), (BN, BK))
            total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    return total


@triton.jit
def _root_mean_square(square_ptr, at, eps, K: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr):
    """Of rows `at` of x: 1 / the root of their mean square, for what was kept in `GAINED` size."""
    tile = tl.arange(0, PADDED)
    squares = tl.load(square_ptr + at[:, None] * TILES + tile[None, :], mask=(tile < TILES)[None, :], other=0.0)
    return tl.rsqrt(tl.sum(squares, 1) / K + eps) / GAINED


@triton.jit
def _halves(total, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(total, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _begin(x_ptr, gain_ptr, gained_ptr, square_ptr, K: tl.constexpr, PADDED: tl.constexpr, TILES: tl.constexpr,
           TILES_PADDED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    row, k, tile = tl.program_id(0), tl.arange(0, PADDED), tl.arange(0, TILES_PADDED)
    _let_next_start(PDL)
    gain = tl.load(gain_ptr + k, mask=k < K, other=0.0)
    _wait(PDL)
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0)
    tl.store(gained_ptr + row * K + k, (x * gain * GAINED).to(gained_ptr.dtype.element_ty), mask=k < K)
    tl.store(square_ptr + row * TILES + tile, tl.where(tile == 0, tl.sum(x * x, 0), 0.0), mask=tile < TILES)


@triton.jit(do_not_specialize=["M"])
def _turned(x_ptr, square_ptr, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, bias_ptr, cos_ptr, sin_ptr,
            position_ptr, owner_ptr, page_ptr, q_ptr, key_ptr, value_ptr, M, eps, page_stride: tl.constexpr,
            HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, TILES: tl.constexpr,
            TILES_PADDED: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
            LOOKUP: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
            LINES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Queries, keys and values of the normed x; the first two rotated, the last two stored in their row's page."""
    half: tl.constexpr = DIM // 2
    pairs: tl.constexpr = BN // 2
    head = tl.program_id(0) // (half // pairs)
    column, first = tl.arange(0, BN), (tl.program_id(0) % (half // pairs)) * pairs
    n = head * DIM + column // pairs * half + first + column % pairs  # what turns together
    pair = first + tl.arange(0, pairs)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    inside, at = m < M, tl.minimum(m, M - 1)
    _let_next_start(PDL)
    _prefetch(w_ptr, n, 0, LINES, K, KIND, PDL)
    bias = tl.load(bias_ptr + n)
    _wait(PDL)
    total = _accumulate(x_ptr, at, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, n, 0, SPAN, K, KIND, BLOCK,
                        LOOKUP, DOT, BM, BN, BK)  # fmt: skip
    total = total * _root_mean_square(square_ptr, at, eps, K, TILES, TILES_PADDED)[:, None] + bias[None, :]
    one, two = _halves(total, BM, BN)
    place = tl.load(position_ptr + at)
    position = tl.maximum(place, 0)
    if head < HEADS + KV_HEADS:
        angle = position[:, None] * half + pair[None, :]
        cos, sin = tl.load(cos_ptr + angle), tl.load(sin_ptr + angle)
        turned = one * cos - two * sin
        two = two * cos + one * sin
        one = turned
    if head < HEADS:
        q = q_ptr + (m[:, None] * HEADS + head) * DIM + pair[None, :]
        tl.store(q, one.to(q_ptr.dtype.element_ty), mask=inside[:, None])
        tl.store(q + half, two.to(q_ptr.dtype.element_ty), mask=inside[:, None])
    else:
        owner = tl.load(owner_ptr + at)
        page = tl.load(page_ptr + owner * page_stride + position // PAGE, mask=place >= 0, other=0).to(tl.int64)
        cache = key_ptr if head < HEADS + KV_HEADS else value_ptr
        to = ((page * KV_HEADS + (head - HEADS) % KV_HEADS) * PAGE + position % PAGE)[:, None] * DIM + pair[None, :]
        tl.store(cache + to, one.to(key_ptr.dtype.element_ty), mask=inside[:, None])
        tl.store(cache + to + half, two.to(key_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["M"])
def _attend(q_ptr, key_ptr, value_ptr, position_ptr, owner_ptr, page_ptr, out_ptr, M, softmax_scale,
            page_stride: tl.constexpr, PAGES: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
            DIM: tl.constexpr, PAGE: tl.constexpr, TOGETHER: tl.constexpr, PLACES: tl.constexpr, STEP: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """Either all heads of one row that share keys, or one head at `TOGETHER` positions of one row.

    Both fill `PLACES` rows of a tile; running softmax over the row's pages.
    """
    group: tl.constexpr = HEADS // KV_HEADS
    i, d = tl.arange(0, PLACES), tl.arange(0, DIM)
    if TOGETHER == 1:
        kv_head = tl.program_id(1)
        m, head = tl.program_id(0) + 0 * i, kv_head * group + i
        inside = i < group
        head = tl.where(inside, head, 0)
    else:
        kv_head = tl.program_id(1) // group
        m, head = tl.program_id(0) * PLACES + i, tl.program_id(1) + 0 * i
        inside = m < M
    at = tl.where(inside, m, tl.program_id(0) * TOGETHER)
    owner = tl.load(owner_ptr + tl.program_id(0) * TOGETHER)
    _let_next_start(PDL)
    _wait(PDL)
    position = tl.load(position_ptr + at)
    last = tl.max(position, 0)
    q = tl.load(q_ptr + (at * HEADS + head)[:, None] * DIM + d[None, :])
    largest, total = tl.full((PLACES,), -1e30, tl.float32), tl.zeros((PLACES,), tl.float32)
    out = tl.zeros((PLACES, DIM), tl.float32)
    for begin in range(0, PAGES * PAGE, STEP):
        key = begin + tl.arange(0, STEP)
        page = tl.load(page_ptr + owner * page_stride + begin // PAGE, mask=begin <= last, other=0).to(tl.int64)
        tile = ((page * KV_HEADS + kv_head) * PAGE + key % PAGE)[:, None] * DIM + d[None, :]
        there = (key <= last)[:, None]
        keys = tl.load(key_ptr + tile, mask=there, other=0.0)
        values = tl.load(value_ptr + tile, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * softmax_scale
        scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights, kept = tl.exp(scores - larger[:, None]), tl.exp(largest - larger)
        total = total * kept + tl.sum(weights, 1)
        out = tl.dot(weights.to(values.dtype), values, out * kept[:, None], input_precision="ieee")
        largest = larger
    out = out / tl.maximum(total, 1e-30)[:, None]  # a row that is nobody's attends to nothing
    to = out_ptr + (m * HEADS + head)[:, None] * DIM + d[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["M"])
def _gated(x_ptr, square_ptr, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, out_ptr, M, eps, N: tl.constexpr,
           TILES: tl.constexpr, TILES_PADDED: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr, KIND: tl.constexpr,
           BLOCK: tl.constexpr, LOOKUP: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
           BK: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """silu(gate) * up of the normed x, [M, N]; the weight's first N rows are the gate's."""
    pairs: tl.constexpr = BN // 2
    column, first = tl.arange(0, BN), tl.program_id(0) * pairs
    n = tl.minimum(first + column % pairs, N - 1) + column // pairs * N
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    at = tl.minimum(m, M - 1)
    _let_next_start(PDL)
    _prefetch(w_ptr, n, 0, LINES, K, KIND, PDL)
    _wait(PDL)
    total = _accumulate(x_ptr, at, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, n, 0, SPAN, K, KIND, BLOCK,
                        LOOKUP, DOT, BM, BN, BK)  # fmt: skip
    gate, up = _halves(total * _root_mean_square(square_ptr, at, eps, K, TILES, TILES_PADDED)[:, None], BM, BN)
    out = first + tl.arange(0, pairs)
    both = (m < M)[:, None] & (out < N)[None, :]
    result = gate / (1 + tl.exp(-gate)) * up
    tl.store(out_ptr + m[:, None] * N + out[None, :], result.to(out_ptr.dtype.element_ty), mask=both)


@triton.jit
def _leave(total, m, n, M, x_ptr, gain_ptr, gained_ptr, square_ptr, N: tl.constexpr, TILES: tl.constexpr):
    """Add to x, and keep what the next norm needs."""
    both = (m < M)[:, None] & (n < N)[None, :]
    to = m[:, None] * N + n[None, :]
    x = tl.where(both, total + tl.load(x_ptr + to, mask=both, other=0.0), 0.0)
    tl.store(x_ptr + to, x, mask=both)
    gain = tl.load(gain_ptr + n, mask=n < N, other=0.0) * GAINED
    tl.store(gained_ptr + to, (x * gain[None, :]).to(gained_ptr.dtype.element_ty), mask=both)
    tl.store(square_ptr + m * TILES + tl.program_id(0), tl.sum(x * x, 1), mask=m < M)


@triton.jit(do_not_specialize=["M"])
def _added(y_ptr, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, x_ptr, gain_ptr, gained_ptr, square_ptr, part_ptr,
           count_ptr, M, N: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr,
           K: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, LOOKUP: tl.constexpr, DOT: tl.constexpr,
           BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """x [M, N] += y [M, K] times the weight, whose columns `SPLITS` programs share; the last to end adds up."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    first = tl.program_id(2) * SPAN
    at, row = tl.minimum(m, M - 1), tl.minimum(n, N - 1)
    _let_next_start(PDL)
    _prefetch(w_ptr, row, first, LINES, K, KIND, PDL)
    _wait(PDL)
    total = _accumulate(y_ptr, at, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, row, first, SPAN, K, KIND, BLOCK,
                        LOOKUP, DOT, BM, BN, BK)  # fmt: skip
    if SPLITS == 1:
        _leave(total, m, n, M, x_ptr, gain_ptr, gained_ptr, square_ptr, N, TILES)
    else:
        tile = tl.program_id(1) * TILES + tl.program_id(0)
        place = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        tl.store(part_ptr + (tile * SPLITS + tl.program_id(2)) * (BM * BN) + place, total)
        tl.debug_barrier()  # all of it is there before it is counted
        if tl.atomic_add(count_ptr + tile, 1) == SPLITS - 1:
            total = tl.zeros((BM, BN), tl.float32)
            for split in tl.static_range(SPLITS):  # in one order, whoever comes last
                total += tl.load(part_ptr + (tile * SPLITS + split) * (BM * BN) + place, cache_modifier=".cg")
            _leave(total, m, n, M, x_ptr, gain_ptr, gained_ptr, square_ptr, N, TILES)
            tl.store(count_ptr + tile, 0)


@triton.jit(do_not_specialize=["M"])
def _head(x_ptr, square_ptr, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, out_ptr, M, eps, N: tl.constexpr,
          TILES: tl.constexpr, TILES_PADDED: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr, KIND: tl.constexpr,
          BLOCK: tl.constexpr, LOOKUP: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
          BK: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The normed x times the weight, [M, N]."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    at, row = tl.minimum(m, M - 1), tl.minimum(n, N - 1)
    _let_next_start(PDL)
    _prefetch(w_ptr, row, 0, LINES, K, KIND, PDL)
    _wait(PDL)
    total = _accumulate(x_ptr, at, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, row, 0, SPAN, K, KIND, BLOCK,
                        LOOKUP, DOT, BM, BN, BK)  # fmt: skip
    total *= _root_mean_square(square_ptr, at, eps, K, TILES, TILES_PADDED)[:, None]
    tl.store(out_ptr + m[:, None] * N + n[None, :], total, mask=(m < M)[:, None] & (n < N)[None, :])


@dataclass(frozen=True)
class Tile:
    """A product's tile: rows of activations, rows of weights, columns a step, warps, stages; splits of the columns."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    splits: int = 1


@dataclass(frozen=True)
class Tiles:
    """`output` and `down` have one n: a row's squares are kept by it."""

    qkv: Tile
    output: Tile
    gate_up: Tile
    down: Tile
    head: Tile
    step: int = 128  # keys


def tiles(rows: int, *, together: bool) -> Tiles:
    """Measured on an H100 (docs/speed.md)."""
    m = 16 if rows <= 16 else 32
    if not together:
        return Tiles(
            qkv=Tile(m, 16, 128, 4, 4), output=Tile(m, 16, 128, 4, 4), gate_up=Tile(m, 64, 128, 4, 4),
            down=Tile(m, 16, 256, 4, 4, 2), head=Tile(m, 32, 128, 4, 4),
        )  # fmt: skip
    return Tiles(
        qkv=Tile(64, 64, 128, 4, 3), output=Tile(64, 32, 128, 4, 3), gate_up=Tile(64, 128, 128, 8, 3),
        down=Tile(64, 32, 128, 4, 3, 4 if rows <= 128 else 1), head=Tile(16, 32, 128, 4, 4),
    )  # fmt: skip


@dataclass(frozen=True)
class Shared:
    """How long the buffers are that do not depend on the model alone."""

    squares: int
    parts: int
    counts: int


def shared_sizes(hidden: int, m: int) -> Shared:
    """For passes over up to m rows of x [m, hidden]."""
    squares = parts = counts = 0
    for rows in {*range(1, min(m, 64) + 1), *range(64, m + 1, 32)}:
        for together in (False, True):
            t = tiles(rows, together=together)
            wide = triton.cdiv(hidden, t.down.n)
            squares = max(squares, rows * wide)
            for one in (t.output, t.down):
                places = triton.cdiv(rows, one.m) * wide
                if one.splits > 1:
                    counts, parts = max(counts, places), max(parts, places * one.splits * one.m * one.n)
    return Shared(squares, max(parts, 1), max(counts, 1))


@dataclass(frozen=True)
class Rows:
    """What the kernels of a pass over up to m rows share.

    x: float32 [m, hidden], what goes through the layers.
    gained: [m, hidden] in the products' type, x times the next norm's gain.
    squares: float32 [m, tiles] or larger, sums of x's squares.
    q, attended: [m, heads * dim], inner: [m, intermediate], in the products' type.
    parts, counts: float32 and int32 (zeros), for products whose columns are split.
    positions: int32 [m], -1 of nobody; owners: int32 [m], a row's place in pages, int32 [owners, pages a row].
    cos, sin: float32 [positions, dim / 2].
    """

    x: Tensor
    gained: Tensor
    squares: Tensor
    q: Tensor
    attended: Tensor
    inner: Tensor
    parts: Tensor
    counts: Tensor
    positions: Tensor
    owners: Tensor
    pages: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Pass:
    """`rows` of them, none beyond the first `used` pages of its row.

    together: rows come in `TOGETHER` positions of one prompt each; otherwise each is an utterance of its own.
    """

    rows: int
    used: int
    together: bool
    heads: int
    kv_heads: int
    dim: int
    eps: float
    tiles: Tiles
    pdl: bool

    def launch(self, warps: int, stages: int) -> dict[str, Any]:
        return {"PDL": self.pdl, "num_warps": warps, "num_stages": stages} | ({"launch_pdl": True} if self.pdl else {})

    def product(self, packed: Packed, tile: Tile, x: Tensor) -> dict[str, Any]:
        bk = min(tile.k, max(triton.next_power_of_2(packed.k), 16))
        span = -(-triton.cdiv(packed.k, tile.splits) // bk) * bk
        a_line = {INT8.value: 128, FLOAT.value: 128 // packed.weight.element_size()}.get(packed.kind, 256)
        lines = triton.next_power_of_2(triton.cdiv(min(span, packed.k), a_line) + 1)
        return {
            "LINES": lines, "K": packed.k, "SPAN": span, "KIND": packed.kind, "BLOCK": packed.block,
            "LOOKUP": packed.lookup, "DOT": DOT_DTYPES[x.dtype], "BM": tile.m, "BN": tile.n, "BK": bk,
        } | self.launch(tile.warps, tile.stages)  # fmt: skip

    def squares(self, hidden: int) -> dict[str, int]:
        count = triton.cdiv(hidden, self.tiles.down.n)
        return {"TILES": count, "TILES_PADDED": triton.next_power_of_2(count)}


def begin(gain: Tensor, b: Rows, p: Pass) -> None:
    """What the first norm needs of x."""
    width = b.x.shape[1]
    _begin[(p.rows,)](
        b.x, gain, b.gained, b.squares, K=width, PADDED=triton.next_power_of_2(width), **p.squares(width),
        **p.launch(4, 1),
    )  # fmt: skip


def run_layer(layer: Layer, next_gain: Tensor, keys: Tensor, values: Tensor, b: Rows, p: Pass) -> None:
    """x after one layer, in place; keys and values [pages, kv_heads, PAGE, dim] gain the rows' positions.

    next_gain: of the norm that follows the layer.
    """
    t, m, stride = p.tiles, p.rows, b.pages.stride(0)
    squares = p.squares(b.x.shape[1])
    turned = p.product(layer.qkv, t.qkv, b.gained)
    turned["BN"] = min(t.qkv.n, p.dim)
    _turned[((p.heads + 2 * p.kv_heads) * (p.dim // turned["BN"]), triton.cdiv(m, t.qkv.m))](
        b.gained, b.squares, *layer.qkv.pointers, layer.qkv.bias, b.cos, b.sin, b.positions, b.owners, b.pages, b.q,
        keys, values, m, p.eps, page_stride=stride, HEADS=p.heads, KV_HEADS=p.kv_heads, DIM=p.dim, PAGE=PAGE,
        **squares, **turned,
    )  # fmt: skip
    attend(keys, values, b, p)
    _add(b.attended, layer.output, layer.mlp_norm, t.output, b, p)
    inner = layer.gate_up.n // 2
    _gated[(triton.cdiv(inner, t.gate_up.n // 2), triton.cdiv(m, t.gate_up.m))](
        b.gained, b.squares, *layer.gate_up.pointers, b.inner, m, p.eps, N=inner, **squares,
        **p.product(layer.gate_up, t.gate_up, b.gained),
    )  # fmt: skip
    _add(b.inner, layer.down, next_gain, t.down, b, p)


def attend(keys: Tensor, values: Tensor, b: Rows, p: Pass) -> None:
    """`attended` of q, each row over the positions of its own pages up to its own."""
    places = TOGETHER if p.together else max(triton.next_power_of_2(p.heads // p.kv_heads), 16)
    grid = (triton.cdiv(p.rows, TOGETHER), p.heads) if p.together else (p.rows, p.kv_heads)
    _attend[grid](
        b.q, keys, values, b.positions, b.owners, b.pages, b.attended, p.rows, p.dim**-0.5,
        page_stride=b.pages.stride(0), PAGES=p.used, HEADS=p.heads, KV_HEADS=p.kv_heads, DIM=p.dim, PAGE=PAGE,
        TOGETHER=TOGETHER if p.together else 1, PLACES=places, STEP=p.tiles.step, **p.launch(4, 3),
    )  # fmt: skip


def _add(y: Tensor, packed: Packed, gain: Tensor, tile: Tile, b: Rows, p: Pass) -> None:
    count = triton.cdiv(packed.n, tile.n)
    sizes = p.product(packed, tile, y)
    splits = triton.cdiv(packed.k, sizes["SPAN"])
    _added[(count, triton.cdiv(p.rows, tile.m), splits)](
        y, *packed.pointers, b.x, gain, b.gained, b.squares, b.parts, b.counts, p.rows, N=packed.n, TILES=count,
        SPLITS=splits, **sizes,
    )  # fmt: skip


def run_head(head: Packed, gained: Tensor, squares: Tensor, logits: Tensor, p: Pass) -> None:
    """logits [m, n] float32 of the normed x."""
    m, t = logits.shape[0], p.tiles.head
    _head[(triton.cdiv(head.n, t.n), triton.cdiv(m, t.m))](
        gained, squares, *head.pointers, logits, m, p.eps, N=head.n, **p.squares(head.k),
        **p.product(head, t, gained),
    )  # fmt: skip
