"""Attention of several rows over keys and values in pages: utterances of a batch, or positions of prompts."""

from __future__ import annotations

import triton
import triton.language as tl

from cosyq.kernels.device.overlap import let_next_start, wait


@triton.jit
def _look(q, out, largest, total, key, position, keys, values, softmax_scale):
    """Positions `key` more for a tile of queries: their sums, largest scores and sums of weights."""
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * softmax_scale
    scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
    larger = tl.maximum(largest, tl.max(scores, 1))
    weights, kept = tl.exp(scores - larger[:, None]), tl.exp(largest - larger)
    out = tl.dot(weights.to(values.dtype), values, out * kept[:, None], input_precision="ieee")
    return out, larger, total * kept + tl.sum(weights, 1)


@triton.jit
def _left(stat, part, mine, page, pages, PLACES: tl.constexpr, DIM: tl.constexpr):
    """What the program of a page has left: sums, largest scores and sums of weights; of one that is not, nothing."""
    there, at = page < pages, mine + page
    largest = tl.load(stat + at * 2 * PLACES, mask=there, other=-1e30, cache_modifier=".cg")
    total = tl.load(stat + at * 2 * PLACES + PLACES, mask=there, other=0.0, cache_modifier=".cg")
    return tl.load(part + at * PLACES * DIM, mask=there, other=0.0, cache_modifier=".cg"), largest, total


@triton.jit
def _merged(out, largest, total, other_out, other_largest, other_total):
    larger = tl.maximum(largest, other_largest)
    kept, added = tl.exp(largest - larger), tl.exp(other_largest - larger)
    return out * kept[:, None] + other_out * added[:, None], larger, total * kept + other_total * added


@triton.jit
def attend_rows_kernel(q_ptr, key_ptr, value_ptr, position_ptr, owner_ptr, page_ptr, out_ptr, part_ptr, stat_ptr,
                       count_ptr, softmax_scale, page_stride: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
                       DIM: tl.constexpr, PAGE: tl.constexpr, PLACES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """All heads of one row that share keys, over one page; who comes last of the row's pages merges them.

    All but the row's last position was there before the kernel in front began, and is fetched while that one runs.
    """
    row, kv_head, number = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = HEADS // KV_HEADS
    i, d = tl.arange(0, PLACES), tl.arange(0, DIM)
    inside = i < group
    head = kv_head * group + tl.minimum(i, group - 1)
    last = tl.load(position_ptr + row, cache_modifier=".cg")
    page = tl.load(page_ptr + tl.load(owner_ptr + row) * page_stride + number).to(tl.int64)
    begin, key = (page * KV_HEADS + kv_head) * PAGE * DIM, number * PAGE + tl.arange(0, PAGE)
    tile, past = begin + tl.arange(0, PAGE)[:, None] * DIM + d[None, :], (key < last)[:, None]
    keys = tl.load(key_ptr + tile, mask=past, other=0.0, cache_modifier=".cg")
    values = tl.load(value_ptr + tile, mask=past, other=0.0, cache_modifier=".cg")
    wait(PDL)
    let_next_start(PDL)
    if number * PAGE <= tl.maximum(last, 0):
        q = tl.load(q_ptr + (row * HEADS + head)[:, None] * DIM + d[None, :])
        new = begin + tl.maximum(tl.minimum(last - number * PAGE, PAGE - 1), 0) * DIM + d
        keys = tl.where((key == last)[:, None], tl.load(key_ptr + new)[None, :], keys)
        values = tl.where((key == last)[:, None], tl.load(value_ptr + new)[None, :], values)
        out, largest, total = _look(
            q, tl.zeros((PLACES, DIM), tl.float32), tl.full((PLACES,), -1e30, tl.float32),
            tl.zeros((PLACES,), tl.float32), key, last + 0 * i, keys, values, softmax_scale,
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
                first = 0
                while first < pages:  # in one order, whoever comes last; all are asked for before the first is needed
                    out0, largest0, total0 = _left(stat, part_ptr + part, mine, first, pages, PLACES, DIM)
                    out1, largest1, total1 = _left(stat, part_ptr + part, mine, first + 1, pages, PLACES, DIM)
                    out2, largest2, total2 = _left(stat, part_ptr + part, mine, first + 2, pages, PLACES, DIM)
                    out3, largest3, total3 = _left(stat, part_ptr + part, mine, first + 3, pages, PLACES, DIM)
                    out, largest, total = _merged(out, largest, total, out0, largest0, total0)
                    out, largest, total = _merged(out, largest, total, out1, largest1, total1)
                    out, largest, total = _merged(out, largest, total, out2, largest2, total2)
                    out, largest, total = _merged(out, largest, total, out3, largest3, total3)
                    first += 4
                tl.store(to, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside[:, None])
                tl.store(count, 0)


@triton.jit(do_not_specialize=["M"])
def attend_prompts_kernel(q_ptr, key_ptr, value_ptr, position_ptr, owner_ptr, page_ptr, out_ptr, M, softmax_scale,
                          page_stride: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
                          PAGE: tl.constexpr, TOGETHER: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One head at `TOGETHER` positions of one utterance."""
    i, d, head = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER), tl.arange(0, DIM), tl.program_id(1)
    inside, at = i < M, tl.minimum(i, M - 1)
    kv_head = head // (HEADS // KV_HEADS)
    table = page_ptr + tl.load(owner_ptr + tl.program_id(0) * TOGETHER) * page_stride
    wait(PDL)
    position = tl.load(position_ptr + at)
    last = tl.max(position, 0)
    q = tl.load(q_ptr + (at * HEADS + head)[:, None] * DIM + d[None, :])
    largest, total = tl.full((TOGETHER,), -1e30, tl.float32), tl.zeros((TOGETHER,), tl.float32)
    out = tl.zeros((TOGETHER, DIM), tl.float32)
    number = 0
    page = tl.load(table)
    while number * PAGE <= last:
        following = tl.load(table + number + 1, mask=(number + 1) * PAGE <= last, other=0)
        key, begin = number * PAGE + tl.arange(0, PAGE), (page.to(tl.int64) * KV_HEADS + kv_head) * PAGE * DIM
        tile, seen = begin + tl.arange(0, PAGE)[:, None] * DIM + d[None, :], (key <= last)[:, None]
        keys = tl.load(key_ptr + tile, mask=seen, other=0.0)
        values = tl.load(value_ptr + tile, mask=seen, other=0.0)
        out, largest, total = _look(q, out, largest, total, key, position, keys, values, softmax_scale)
        page = following
        number += 1
    let_next_start(PDL)
    out = out / tl.maximum(total, 1e-30)[:, None]  # a row that is nobody's attends to nothing
    to = out_ptr + (i * HEADS + head)[:, None] * DIM + d[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=inside[:, None])
