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
from cosyq.kernels.packed import INT8_STEP, NESTED_BLOCKS, Packed, decode

DOT_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
TOGETHER = 16  # positions of one prompt that attend together: prompts begin at multiples of it
GAINED = tl.constexpr(1 / 64)  # x times a gain is kept so much smaller, which a float16 needs


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
def _weights(w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, n, first, K: tl.constexpr, KIND: tl.constexpr,
             BLOCK: tl.constexpr, LOOKUP: tl.constexpr, DOT: tl.constexpr, WAYS: tl.constexpr, BN: tl.constexpr,
             BK: tl.constexpr):  # fmt: skip
    """Columns first .. first + BK of the rows n, in as many parts as there are warps: [WAYS, BN, BK / WAYS].

    Those of int8 lack their rows' scales.
    """
    width: tl.constexpr = BK // WAYS
    begin, row = first + tl.arange(0, WAYS)[:, None, None] * width, n.to(tl.int64)[None, :, None]
    if (KIND == 0) or (KIND == 3):
        k = begin + tl.arange(0, width)[None, None, :]
        return tl.load(w_ptr + row * K + k, mask=k < K, other=0).to(DOT)
    else:
        blocks: tl.constexpr = width // BLOCK if width > BLOCK else 1
        byte = begin // 2 + tl.arange(0, width // 2)[None, None, :]
        codes = tl.load(w_ptr + row * (K // 2) + byte, mask=byte < K // 2, other=0)
        block = tl.minimum(begin // BLOCK + tl.arange(0, blocks)[None, None, :], K // BLOCK - 1)
        index = row * (K // BLOCK) + block
        scales = _scales(tl.load(scale_ptr + index), index // NESTED_BLOCKS, group_ptr, code_ptr, KIND)
        scales = tl.broadcast_to(scales[:, :, :, None], (WAYS, BN, blocks, width // 2 // blocks))
        scales = tl.reshape(scales, (WAYS, BN, width // 2))
        high, low = decode(codes, table_ptr, KIND, LOOKUP)
        return tl.reshape(tl.join((high * scales).to(DOT), (low * scales).to(DOT)), (WAYS, BN, width))


@triton.jit
def _columns(x_ptr, at, first, K: tl.constexpr, WAYS: tl.constexpr, BK: tl.constexpr):
    """Of rows `at` of x what `_weights` are multiplied by: [WAYS, BM, BK / WAYS]."""
    width: tl.constexpr = BK // WAYS
    k = first + tl.arange(0, WAYS)[:, None, None] * width + tl.arange(0, width)[None, None, :]
    return tl.load(x_ptr + at[None, :, None] * K + k, mask=k < K, other=0.0)


@triton.jit
def _times(x, w):
    """`_columns` times `_weights`: [BM, BN] float32. Each warp sums a part of the columns."""
    return tl.sum(tl.dot(x, tl.permute(w, (0, 2, 1)), input_precision="ieee"), 0)


@triton.jit
def _squares(square_ptr, at, TILES: tl.constexpr, PADDED: tl.constexpr):
    """Of rows `at` of x, every tile's sum of squares."""
    tile = tl.arange(0, PADDED)
    return tl.load(square_ptr + at[:, None] * TILES + tile[None, :], mask=(tile < TILES)[None, :], other=0.0)


@triton.jit
def _factor(squares, eps, K: tl.constexpr):
    """1 / the root of the mean square of each row, for what was kept in `GAINED` size."""
    return tl.rsqrt(tl.sum(squares, 1) / K + eps) / GAINED


@triton.jit
def _row_scales(scale_ptr, n, KIND: tl.constexpr):
    if KIND == 0:
        return tl.load(scale_ptr + n) * INT8_STEP
    else:
        return tl.full(n.shape, 1.0, tl.float32)


@triton.jit
def _halves(total, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(total, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _begin(x_ptr, gain_ptr, gained_ptr, square_ptr, K: tl.constexpr, PADDED: tl.constexpr, TILES: tl.constexpr,
           TILES_PADDED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    row, k, tile = tl.program_id(0), tl.arange(0, PADDED), tl.arange(0, TILES_PADDED)
    gain = tl.load(gain_ptr + k, mask=k < K, other=0.0)
    _wait(PDL)
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0)
    _let_next_start(PDL)
    tl.store(gained_ptr + row * K + k, (x * gain * GAINED).to(gained_ptr.dtype.element_ty), mask=k < K)
    tl.store(square_ptr + row * TILES + tile, tl.where(tile == 0, tl.sum(x * x, 0), 0.0), mask=tile < TILES)


@triton.jit(do_not_specialize=["M"])
def _turned(x_ptr, square_ptr, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, bias_ptr, cos_ptr, sin_ptr,
            position_ptr, owner_ptr, page_ptr, q_ptr, key_ptr, value_ptr, M, eps, page_stride: tl.constexpr,
            HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, TILES: tl.constexpr,
            TILES_PADDED: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
            LOOKUP: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
            WAYS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Queries, keys and values of the normed x; the first two rotated, the last two stored in their row's page."""
    half: tl.constexpr = DIM // 2
    pairs: tl.constexpr = BN // 2
    head = tl.program_id(0) // (half // pairs)
    pair = tl.program_id(0) % (half // pairs) * pairs + tl.arange(0, pairs)
    upper, lower = head * DIM + pair, head * DIM + half + pair  # the rows that turn together
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    inside, at = m < M, tl.minimum(m, M - 1)
    if WAYS > 1:
        w1 = _weights(w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, upper, 0, K, KIND, BLOCK, LOOKUP, DOT, WAYS,
                      BN // 2, BK)  # fmt: skip
        w2 = _weights(w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, lower, 0, K, KIND, BLOCK, LOOKUP, DOT, WAYS,
                      BN // 2, BK)  # fmt: skip
    else:
        column = tl.arange(0, BN)
        n = head * DIM + column // pairs * half + tl.program_id(0) % (half // pairs) * pairs + column % pairs
    scale1, scale2 = _row_scales(scale_ptr, upper, KIND), _row_scales(scale_ptr, lower, KIND)
    bias1, bias2, owner = tl.load(bias_ptr + upper), tl.load(bias_ptr + lower), tl.load(owner_ptr + at)
    _wait(PDL)
    if WAYS > 1:
        x = _columns(x_ptr, at, 0, K, WAYS, BK)
    squares, place = _squares(square_ptr, at, TILES, TILES_PADDED), tl.load(position_ptr + at)
    position = tl.maximum(place, 0)
    page = tl.load(page_ptr + owner * page_stride + position // PAGE, mask=place >= 0, other=0).to(tl.int64)
    angle = position[:, None] * half + pair[None, :]
    cos, sin = tl.load(cos_ptr + angle), tl.load(sin_ptr + angle)
    factor = _factor(squares, eps, K)
    if WAYS > 1:
        one, two = _times(x, w1), _times(x, w2)
    else:
        one, two = _halves(_accumulate(x_ptr, at, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, n, 0, SPAN, K,
                                       KIND, BLOCK, LOOKUP, DOT, BM, BN, BK), BM, BN)  # fmt: skip
    _let_next_start(PDL)
    one = one * factor[:, None] * scale1[None, :] + bias1[None, :]
    two = two * factor[:, None] * scale2[None, :] + bias2[None, :]
    if head < HEADS + KV_HEADS:
        turned = one * cos - two * sin
        two = two * cos + one * sin
        one = turned
    if head < HEADS:
        q = q_ptr + (m[:, None] * HEADS + head) * DIM + pair[None, :]
        tl.store(q, one.to(q_ptr.dtype.element_ty), mask=inside[:, None])
        tl.store(q + half, two.to(q_ptr.dtype.element_ty), mask=inside[:, None])
    else:
        cache = key_ptr if head < HEADS + KV_HEADS else value_ptr
        to = ((page * KV_HEADS + (head - HEADS) % KV_HEADS) * PAGE + position % PAGE)[:, None] * DIM + pair[None, :]
        tl.store(cache + to, one.to(key_ptr.dtype.element_ty), mask=inside[:, None])
        tl.store(cache + to + half, two.to(key_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _look(q, out, largest, total, number, position, last, page, kv_head, key_ptr, value_ptr, softmax_scale,
          KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    """One page more for a tile of queries: their sums, largest scores and sums of weights."""
    at, d = tl.arange(0, PAGE), tl.arange(0, DIM)
    tile = (page.to(tl.int64) * KV_HEADS + kv_head) * PAGE * DIM + at[:, None] * DIM + d[None, :]
    key = number * PAGE + at
    keys = tl.load(key_ptr + tile, mask=(key <= last)[:, None], other=0.0)
    values = tl.load(value_ptr + tile, mask=(key <= last)[:, None], other=0.0)
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * softmax_scale
    scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
    larger = tl.maximum(largest, tl.max(scores, 1))
    weights, kept = tl.exp(scores - larger[:, None]), tl.exp(largest - larger)
    out = tl.dot(weights.to(values.dtype), values, out * kept[:, None], input_precision="ieee")
    return out, larger, total * kept + tl.sum(weights, 1)


@triton.jit
def _attend_rows(q_ptr, key_ptr, value_ptr, position_ptr, owner_ptr, page_ptr, out_ptr, part_ptr, stat_ptr, count_ptr,
                 softmax_scale, page_stride: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
                 DIM: tl.constexpr, PAGE: tl.constexpr, PLACES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """All heads of one row that share keys, over one page; who comes last of the row's pages merges them."""
    row, kv_head, number = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = HEADS // KV_HEADS
    i, d = tl.arange(0, PLACES), tl.arange(0, DIM)
    inside = i < group
    head = kv_head * group + tl.minimum(i, group - 1)
    page = tl.load(page_ptr + tl.load(owner_ptr + row) * page_stride + number)
    _wait(PDL)
    last = tl.load(position_ptr + row)
    _let_next_start(PDL)
    if number * PAGE <= tl.maximum(last, 0):
        q = tl.load(q_ptr + (row * HEADS + head)[:, None] * DIM + d[None, :])
        out, largest, total = _look(
            q, tl.zeros((PLACES, DIM), tl.float32), tl.full((PLACES,), -1e30, tl.float32),
            tl.zeros((PLACES,), tl.float32), number, last + 0 * i, last, page, kv_head, key_ptr, value_ptr,
            softmax_scale, KV_HEADS, DIM, PAGE,
        )  # fmt: skip
        to = out_ptr + (row * HEADS + head)[:, None] * DIM + d[None, :]
        pages = tl.maximum(last, 0) // PAGE + 1
        if pages == 1:
            out = out / tl.maximum(total, 1e-30)[:, None]  # a row that is nobody's attends to nothing
            tl.store(to, out.to(out_ptr.dtype.element_ty), mask=inside[:, None])
        else:
            mine = (row * KV_HEADS + kv_head) * page_stride
            part, stat = i[:, None] * DIM + d[None, :], stat_ptr + i
            tl.store(part_ptr + (mine + number) * PLACES * DIM + part, out)
            tl.store(stat + (mine + number) * 2 * PLACES, largest)
            tl.store(stat + (mine + number) * 2 * PLACES + PLACES, total)
            tl.debug_barrier()  # all of it is there before it is counted
            count = count_ptr + row * KV_HEADS + kv_head
            if tl.atomic_add(count, 1) == pages - 1:
                largest, total = tl.full((PLACES,), -1e30, tl.float32), tl.zeros((PLACES,), tl.float32)
                out = tl.zeros((PLACES, DIM), tl.float32)
                other = 0
                while other < pages:  # in one order, whoever comes last
                    theirs = tl.load(stat + (mine + other) * 2 * PLACES, cache_modifier=".cg")
                    its_total = tl.load(stat + (mine + other) * 2 * PLACES + PLACES, cache_modifier=".cg")
                    its = tl.load(part_ptr + (mine + other) * PLACES * DIM + part, cache_modifier=".cg")
                    larger = tl.maximum(largest, theirs)
                    kept, added = tl.exp(largest - larger), tl.exp(theirs - larger)
                    out = out * kept[:, None] + its * added[:, None]
                    total = total * kept + its_total * added
                    largest = larger
                    other += 1
                tl.store(to, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside[:, None])
                tl.store(count, 0)


@triton.jit(do_not_specialize=["M"])
def _attend_prompts(q_ptr, key_ptr, value_ptr, position_ptr, owner_ptr, page_ptr, out_ptr, M, softmax_scale,
                    page_stride: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
                    PAGE: tl.constexpr, TOGETHER: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One head at `TOGETHER` positions of one utterance."""
    i, d, head = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER), tl.arange(0, DIM), tl.program_id(1)
    inside, at = i < M, tl.minimum(i, M - 1)
    table = page_ptr + tl.load(owner_ptr + tl.program_id(0) * TOGETHER) * page_stride
    _wait(PDL)
    position = tl.load(position_ptr + at)
    last = tl.max(position, 0)
    q = tl.load(q_ptr + (at * HEADS + head)[:, None] * DIM + d[None, :])
    largest, total = tl.full((TOGETHER,), -1e30, tl.float32), tl.zeros((TOGETHER,), tl.float32)
    out = tl.zeros((TOGETHER, DIM), tl.float32)
    number = 0
    page = tl.load(table)
    while number * PAGE <= last:
        following = tl.load(table + number + 1, mask=(number + 1) * PAGE <= last, other=0)
        out, largest, total = _look(
            q, out, largest, total, number, position, last, page, head // (HEADS // KV_HEADS), key_ptr, value_ptr,
            softmax_scale, KV_HEADS, DIM, PAGE,
        )  # fmt: skip
        page = following
        number += 1
    _let_next_start(PDL)
    out = out / tl.maximum(total, 1e-30)[:, None]  # a row that is nobody's attends to nothing
    to = out_ptr + (i * HEADS + head)[:, None] * DIM + d[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["M"])
def _gated(x_ptr, square_ptr, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, out_ptr, M, eps, N: tl.constexpr,
           TILES: tl.constexpr, TILES_PADDED: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr, KIND: tl.constexpr,
           BLOCK: tl.constexpr, LOOKUP: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
           BK: tl.constexpr, WAYS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """silu(gate) * up of the normed x, [M, N]; the weight's first N rows are the gate's."""
    pairs: tl.constexpr = BN // 2
    out = tl.program_id(0) * pairs + tl.arange(0, pairs)
    n = tl.minimum(out, N - 1)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    at = tl.minimum(m, M - 1)
    if WAYS > 1:
        w1 = _weights(w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, n, 0, K, KIND, BLOCK, LOOKUP, DOT, WAYS,
                      BN // 2, BK)  # fmt: skip
        w2 = _weights(w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, N + n, 0, K, KIND, BLOCK, LOOKUP, DOT, WAYS,
                      BN // 2, BK)  # fmt: skip
    else:
        column = tl.arange(0, BN)
        both = tl.minimum(tl.program_id(0) * pairs + column % pairs, N - 1) + column // pairs * N
    scale1, scale2 = _row_scales(scale_ptr, n, KIND), _row_scales(scale_ptr, N + n, KIND)
    _wait(PDL)
    if WAYS > 1:
        x = _columns(x_ptr, at, 0, K, WAYS, BK)
    factor = _factor(_squares(square_ptr, at, TILES, TILES_PADDED), eps, K)
    if WAYS > 1:
        gate, up = _times(x, w1), _times(x, w2)
    else:
        gate, up = _halves(_accumulate(x_ptr, at, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, both, 0, SPAN, K,
                                       KIND, BLOCK, LOOKUP, DOT, BM, BN, BK), BM, BN)  # fmt: skip
    _let_next_start(PDL)
    gate *= factor[:, None] * scale1[None, :]
    up *= factor[:, None] * scale2[None, :]
    result = gate / (1 + tl.exp(-gate)) * up
    tl.store(
        out_ptr + m[:, None] * N + out[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=(m < M)[:, None] & (out < N)[None, :],
    )


@triton.jit
def _leave(x, gain, m, n, M, x_ptr, gained_ptr, square_ptr, N: tl.constexpr, TILES: tl.constexpr):
    """Store x, and what the next norm needs."""
    both = (m < M)[:, None] & (n < N)[None, :]
    to = m[:, None] * N + n[None, :]
    tl.store(x_ptr + to, x, mask=both)
    tl.store(gained_ptr + to, (x * gain[None, :] * GAINED).to(gained_ptr.dtype.element_ty), mask=both)
    x = tl.where(both, x, 0.0)
    tl.store(square_ptr + m * TILES + tl.program_id(0), tl.sum(x * x, 1), mask=m < M)


@triton.jit(do_not_specialize=["M"])
def _added(y_ptr, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, x_ptr, gain_ptr, gained_ptr, square_ptr, part_ptr,
           count_ptr, M, N: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr,
           K: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, LOOKUP: tl.constexpr, DOT: tl.constexpr,
           BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WAYS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """x [M, N] += y [M, K] times the weight, whose columns `SPLITS` programs share; the last to end adds up."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    first = tl.program_id(2) * SPAN
    at, row = tl.minimum(m, M - 1), tl.minimum(n, N - 1)
    if WAYS > 1:
        w = _weights(w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, row, first, K, KIND, BLOCK, LOOKUP, DOT, WAYS,
                     BN, BK)  # fmt: skip
    row_scale = _row_scales(scale_ptr, row, KIND)
    gain = tl.load(gain_ptr + row)
    _wait(PDL)
    if WAYS > 1:
        y = _columns(y_ptr, at, first, K, WAYS, BK)
    x = tl.load(x_ptr + at[:, None] * N + row[None, :])
    if WAYS > 1:
        total = _times(y, w)
    else:
        total = _accumulate(y_ptr, at, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, row, first, SPAN, K, KIND,
                            BLOCK, LOOKUP, DOT, BM, BN, BK)  # fmt: skip
    _let_next_start(PDL)
    total *= row_scale[None, :]
    if SPLITS == 1:
        _leave(x + total, gain, m, n, M, x_ptr, gained_ptr, square_ptr, N, TILES)
    else:
        tile = tl.program_id(1) * TILES + tl.program_id(0)
        place = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        tl.store(part_ptr + (tile * SPLITS + tl.program_id(2)) * (BM * BN) + place, total)
        tl.debug_barrier()  # all of it is there before it is counted
        if tl.atomic_add(count_ptr + tile, 1) == SPLITS - 1:
            total = tl.zeros((BM, BN), tl.float32)
            for split in tl.static_range(SPLITS):  # in one order, whoever comes last
                total += tl.load(part_ptr + (tile * SPLITS + split) * (BM * BN) + place, cache_modifier=".cg")
            _leave(x + total, gain, m, n, M, x_ptr, gained_ptr, square_ptr, N, TILES)
            tl.store(count_ptr + tile, 0)


@triton.jit(do_not_specialize=["M"])
def _head(x_ptr, square_ptr, which_ptr, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, out_ptr, M, eps,
          N: tl.constexpr, TILES: tl.constexpr, TILES_PADDED: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr,
          KIND: tl.constexpr, BLOCK: tl.constexpr, LOOKUP: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr,
          BN: tl.constexpr, BK: tl.constexpr, WAYS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The normed x of some rows times the weight, [M, N]."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    at, row = tl.load(which_ptr + tl.minimum(m, M - 1)), tl.minimum(n, N - 1)
    if WAYS > 1:
        w = _weights(w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, row, 0, K, KIND, BLOCK, LOOKUP, DOT, WAYS,
                     BN, BK)  # fmt: skip
    row_scale = _row_scales(scale_ptr, row, KIND)
    _wait(PDL)
    if WAYS > 1:
        x = _columns(x_ptr, at, 0, K, WAYS, BK)
    factor = _factor(_squares(square_ptr, at, TILES, TILES_PADDED), eps, K)
    if WAYS > 1:
        total = _times(x, w)
    else:
        total = _accumulate(x_ptr, at, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, row, 0, SPAN, K, KIND,
                            BLOCK, LOOKUP, DOT, BM, BN, BK)  # fmt: skip
    _let_next_start(PDL)
    total *= row_scale[None, :]
    total *= factor[:, None]
    tl.store(out_ptr + m[:, None] * N + n[None, :], total, mask=(m < M)[:, None] & (n < N)[None, :])


@dataclass(frozen=True)
class Tile:
    """A product's tile: rows of activations, rows of weights, columns a step, warps, stages.

    splits: programs that share the columns. ways: warps that share them within a program, which then takes all of its
    columns in one step, and fetches the weights before it waits.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    splits: int = 1
    ways: int = 1

    def columns(self, k: int) -> tuple[int, int, int]:
        """Of k columns: how many a step takes, how many a program, and in how many ways."""
        step = min(self.k, max(triton.next_power_of_2(k), 16))
        if self.ways > 1 and step >= k:
            return step, step, min(self.ways, step // 16)
        step = min(step, 128)
        return step, -(-triton.cdiv(k, self.splits) // step) * step, 1

    def parts(self, rows: int, n: int, k: int) -> tuple[int, int]:
        """How many tiles there are, and how many sums of programs that share their columns."""
        count = triton.cdiv(rows, self.m) * triton.cdiv(n, self.n)
        splits = triton.cdiv(k, self.columns(k)[1])
        return count, count * splits * self.m * self.n if splits > 1 else 0


@dataclass(frozen=True)
class Tiles:
    qkv: Tile
    output: Tile
    gate_up: Tile
    down: Tile
    head: Tile


def tiles(rows: int, *, together: bool) -> Tiles:
    """Measured on an H100 (docs/speed.md)."""
    if not together:
        m = 16 if rows <= 16 else 32
        narrow = Tile(16, 16, 1024, 4, 1, ways=4) if m == 16 else Tile(32, 16, 128, 4, 4)
        return Tiles(
            qkv=narrow, output=narrow, gate_up=Tile(m, 64, 128, 4, 4), down=Tile(m, 32, 128, 4, 4, splits=4),
            head=Tile(m, 32, 128, 4, 4),
        )  # fmt: skip
    few = rows <= 128
    return Tiles(
        qkv=Tile(64, 64, 128, 4, 3) if few else Tile(128, 64, 128, 8, 3), output=Tile(64, 32, 128, 4, 3),
        gate_up=Tile(64, 128, 128, 4 if few else 8, 3),
        down=Tile(64, 32, 128, 4, 3, splits=4) if few else Tile(64, 64, 128, 4, 3, splits=2),
        head=Tile(16, 32, 128, 4, 4),
    )  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """What the kernels of a pass over up to m rows share.

    x: float32 [m, hidden], what goes through the layers.
    gained: [m, hidden] in the products' type, x times the next norm's gain.
    squares: float32, sums of x's squares, see `Pass.squares`.
    q, attended: [m, heads * dim], inner: [m, intermediate], in the products' type.
    parts, counts: float32 and int32 (zeros), for products whose columns are split.
    page_parts, page_stats: float32, for rows whose pages are split.
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
    page_parts: Tensor
    page_stats: Tensor
    positions: Tensor
    owners: Tensor
    pages: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Shape:
    """Of the network."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    eps: float


def rows_of(
    s: Shape, positions: Tensor, owners: Tensor, pages: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype,
    *, together: bool,
) -> Rows:  # fmt: skip
    """Zeros for passes over as many rows as there are positions."""
    m, heads, device = len(positions), s.heads * s.dim, positions.device
    squares, counts, parts = 0, m * s.kv_heads, 1
    for rows in range(1, m + 1):
        t = tiles(rows, together=together)
        for tile, k in ((t.output, heads), (t.down, s.inner)):
            squares = max(squares, rows * triton.cdiv(s.hidden, tile.n))
            needed = tile.parts(rows, s.hidden, k)
            counts, parts = max(counts, needed[0]), max(parts, needed[1])

    def empty(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=kind, device=device)

    shared = 0 if together else m * s.kv_heads * pages.shape[1] * places(s.heads, s.kv_heads)
    return Rows(
        empty(m, s.hidden), empty(m, s.hidden, kind=dtype), empty(squares), empty(m, heads, kind=dtype),
        empty(m, heads, kind=dtype), empty(m, s.inner, kind=dtype), empty(parts), empty(counts, kind=torch.int32),
        empty(max(shared * s.dim, 1)), empty(max(shared * 2, 1)), positions, owners, pages, cos, sin,
    )  # fmt: skip


@dataclass(frozen=True)
class Pass:
    """`rows` of them, none beyond the first `used` pages of its row.

    together: rows come in `TOGETHER` positions of one prompt each; otherwise each is an utterance of its own.
    """

    rows: int
    used: int
    together: bool
    shape: Shape
    pdl: bool

    @property
    def tiles(self) -> Tiles:
        return tiles(self.rows, together=self.together)

    def launch(self, warps: int, stages: int) -> dict[str, Any]:
        return {"PDL": self.pdl, "num_warps": warps, "num_stages": stages} | ({"launch_pdl": True} if self.pdl else {})

    def product(self, packed: Packed, tile: Tile, x: Tensor) -> dict[str, Any]:
        step, span, ways = tile.columns(packed.k)
        return {
            "WAYS": ways,
            "K": packed.k, "SPAN": span, "KIND": packed.kind, "BLOCK": packed.block, "LOOKUP": packed.lookup,
            "DOT": DOT_DTYPES[x.dtype], "BM": tile.m, "BN": tile.n, "BK": step,
        } | self.launch(tile.warps, tile.stages)  # fmt: skip

    def squares(self, producer: Tile) -> dict[str, int]:
        """Sums of a row that a product leaves which adds to x."""
        count = triton.cdiv(self.shape.hidden, producer.n)
        return {"TILES": count, "TILES_PADDED": triton.next_power_of_2(count)}


def begin(gain: Tensor, b: Rows, p: Pass) -> None:
    """What the first norm needs of x."""
    width = b.x.shape[1]
    _begin[(p.rows,)](
        b.x, gain, b.gained, b.squares, K=width, PADDED=triton.next_power_of_2(width),
        **p.squares(p.tiles.down), **p.launch(4, 1),
    )  # fmt: skip


def run_layer(layer: Layer, next_gain: Tensor, keys: Tensor, values: Tensor, b: Rows, p: Pass) -> None:
    """x after one layer, in place; keys and values [pages, kv_heads, PAGE, dim] gain the rows' positions.

    next_gain: of the norm that follows the layer.
    """
    t, m, s = p.tiles, p.rows, p.shape
    turned = p.product(layer.qkv, t.qkv, b.gained)
    turned["BN"] = min(t.qkv.n, s.dim)
    _turned[((s.heads + 2 * s.kv_heads) * (s.dim // turned["BN"]), triton.cdiv(m, t.qkv.m))](
        b.gained, b.squares, *layer.qkv.pointers, layer.qkv.bias, b.cos, b.sin, b.positions, b.owners, b.pages, b.q,
        keys, values, m, s.eps, page_stride=b.pages.stride(0), HEADS=s.heads, KV_HEADS=s.kv_heads, DIM=s.dim,
        PAGE=PAGE, **p.squares(t.down), **turned,
    )  # fmt: skip
    attend(keys, values, b, p)
    _add(b.attended, layer.output, layer.mlp_norm, t.output, b, p)
    inner = layer.gate_up.n // 2
    _gated[(triton.cdiv(inner, t.gate_up.n // 2), triton.cdiv(m, t.gate_up.m))](
        b.gained, b.squares, *layer.gate_up.pointers, b.inner, m, s.eps, N=inner, **p.squares(t.output),
        **p.product(layer.gate_up, t.gate_up, b.gained),
    )  # fmt: skip
    _add(b.inner, layer.down, next_gain, t.down, b, p)


def attend(keys: Tensor, values: Tensor, b: Rows, p: Pass) -> None:
    """`attended` of q, each row over the positions of its own pages up to its own."""
    s, given = p.shape, (b.q, keys, values, b.positions, b.owners, b.pages, b.attended)
    sizes = {"page_stride": b.pages.stride(0), "HEADS": s.heads, "KV_HEADS": s.kv_heads, "DIM": s.dim, "PAGE": PAGE}
    if p.together:
        _attend_prompts[(triton.cdiv(p.rows, TOGETHER), s.heads)](
            *given, p.rows, s.dim**-0.5, TOGETHER=TOGETHER, **sizes, **p.launch(4, 1)
        )
    else:
        _attend_rows[(p.rows, s.kv_heads, p.used)](
            *given, b.page_parts, b.page_stats, b.counts, s.dim**-0.5,
            PLACES=places(s.heads, s.kv_heads), **sizes, **p.launch(4, 1),
        )  # fmt: skip


def places(heads: int, kv_heads: int) -> int:
    """Rows of a tile that the heads which share keys take."""
    return max(triton.next_power_of_2(heads // kv_heads), 16)


def _add(y: Tensor, packed: Packed, gain: Tensor, tile: Tile, b: Rows, p: Pass) -> None:
    count = triton.cdiv(packed.n, tile.n)
    sizes = p.product(packed, tile, y)
    splits = triton.cdiv(packed.k, sizes["SPAN"])
    _added[(count, triton.cdiv(p.rows, tile.m), splits)](
        y, *packed.pointers, b.x, gain, b.gained, b.squares, b.parts, b.counts, p.rows, N=packed.n, TILES=count,
        SPLITS=splits, **sizes,
    )  # fmt: skip


def run_head(head: Packed, which: Tensor, logits: Tensor, b: Rows, p: Pass) -> None:
    """logits [m, n] float32 of the normed x of the rows that `which` names, int32 [m] or more, written by no kernel."""
    m, t = logits.shape[0], p.tiles.head
    _head[(triton.cdiv(head.n, t.n), triton.cdiv(m, t.m))](
        b.gained, b.squares, which, *head.pointers, logits, m, p.shape.eps, N=head.n, **p.squares(p.tiles.down),
        **p.product(head, t, b.gained),
    )  # fmt: skip
