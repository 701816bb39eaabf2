"""Repetition-aware sampling and the bookkeeping of a step, one program a row, see `cosyq.kernels.draw`."""

from __future__ import annotations

import triton
import triton.language as tl

from cosyq.kernels import draw
from cosyq.kernels.device.overlap import let_next_start, wait
from cosyq.kernels.device.packed import INT8_STEP

NOT_FINITE, IDLE = tl.constexpr(draw.NOT_FINITE), tl.constexpr(draw.IDLE)


@triton.jit
def _pick(weights, ids, uniform):
    """Of `ids`, the first where the running sum of `weights` passes `uniform` of it; never one of weight zero."""
    sums = tl.cumsum(weights, 0)
    target = uniform * tl.sum(weights, 0)
    beyond: tl.constexpr = 1 << 30
    first = tl.min(tl.where((weights > 0) & (sums > target), ids, beyond), 0)
    last = tl.max(tl.where(weights > 0, ids, -1), 0)
    return tl.where(first == beyond, last, first)


@triton.jit
def _before(keys):
    """How many of `keys` are larger than each."""
    return tl.sum((keys[None, :] > keys[:, None]).to(tl.int32), 1)


@triton.jit
def _keys(weights, ids, PADDED: tl.constexpr):
    """A positive float's bits are ordered as it is; of equal ones the least id comes first."""
    return (weights.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (PADDED - 1 - ids)


@triton.jit
def _weight(key):
    return (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _id(key, PADDED: tl.constexpr):
    return PADDED - 1 - (key & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _sorted(keys, kept, taken, where, slot, KEPT: tl.constexpr):
    """Of `keys`, those `taken` to `where` in `kept`, the largest first; 0 behind the last."""
    at = tl.arange(0, KEPT)
    tl.store(kept + at, tl.full((KEPT,), 0, tl.int64))
    tl.debug_barrier()
    tl.store(kept + where, keys, mask=taken)
    tl.debug_barrier()
    few = tl.load(kept + at)
    place = tl.where(few > 0, _before(few), -1)
    return tl.sum(tl.where(place[:, None] == slot[None, :], few[:, None], 0), 0)


@triton.jit
def _largest(keys, slot, TOP_K: tl.constexpr, TOP_P: tl.constexpr):
    """As many of `keys` as are in the nucleus, one after the other; 0 behind the last."""
    top = tl.zeros(slot.shape, tl.int64)
    taken = 0
    before = 0.0
    while (taken < TOP_K) & (before < TOP_P):
        largest = tl.max(keys, 0)
        top = tl.where(slot == taken, largest, top)
        keys = tl.where(keys == largest, 0, keys)
        before += _weight(largest)
        taken += 1
    return top


@triton.jit
def draw_kernel(logits_ptr, uniform_ptr, recent_ptr, count_ptr, minimum_ptr, maximum_ptr, finished_ptr, next_ptr,
                drawn_ptr, kept_ptr, embedding_ptr, scale_ptr, x_ptr, position_ptr, N: tl.constexpr,
                PADDED: tl.constexpr, VOCABULARY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
                SLOTS: tl.constexpr, WINDOW: tl.constexpr, WINDOW_PADDED: tl.constexpr, MOST_REPEATS: tl.constexpr,
                LONGEST: tl.constexpr, HIDDEN: tl.constexpr, HIDDEN_PADDED: tl.constexpr, INT8: tl.constexpr,
                GROUPS: tl.constexpr, KEPT: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    let_next_start(PDL)
    wait(PDL)
    k = tl.arange(0, HIDDEN_PADDED)
    ended = tl.load(finished_ptr + row) != 0
    if ended:
        tl.store(drawn_ptr + row, IDLE)
    else:
        count = tl.load(count_ptr + row)
        index = tl.arange(0, PADDED)
        logits = tl.load(logits_ptr + row * N + index, mask=index < N, other=float("-inf"))
        strange = tl.sum(((index < N) & ~(tl.abs(logits) < float("inf"))).to(tl.int32), 0)
        too_early = count < tl.load(minimum_ptr + row)
        logits = tl.where(too_early & (index >= VOCABULARY), float("-inf"), logits)
        weights = tl.exp(logits - tl.max(logits, 0))
        weights = weights / tl.sum(weights, 0)
        slot = tl.arange(0, SLOTS)
        largest = tl.max(tl.reshape(weights, (PADDED // GROUPS, GROUPS)), 0)
        taken = weights >= tl.min(tl.where(_before(largest) < TOP_K, largest, float("inf")), 0)
        where = tl.cumsum(taken.to(tl.int32), 0) - 1
        if tl.max(where, 0) < KEPT:
            top = _sorted(_keys(weights, index, PADDED), kept_ptr + row * KEPT, taken, where, slot, KEPT)
        else:  # too many are equal
            top = _largest(_keys(weights, index, PADDED), slot, TOP_K, TOP_P)
        likely = _weight(top)
        before = tl.cumsum(likely, 0) - likely
        likely = tl.where((slot < TOP_K) & (before < TOP_P), likely, 0.0)
        uniform = uniform_ptr + (row * LONGEST + tl.minimum(count, LONGEST - 1)) * 2
        chosen = _pick(likely, slot, tl.load(uniform))
        drawn = tl.sum(tl.where(slot == chosen, _id(top, PADDED), 0), 0)
        turn = tl.arange(0, WINDOW_PADDED)
        recent = tl.load(recent_ptr + row * WINDOW + turn, mask=turn < WINDOW, other=-1)
        if tl.sum((recent == drawn).to(tl.int32), 0) >= MOST_REPEATS:
            drawn = _pick(tl.where(index == drawn, 0.0, weights), index, tl.load(uniform + 1))
        drawn = tl.where(strange > 0, NOT_FINITE, drawn)
        tl.store(drawn_ptr + row, drawn)
        tl.store(recent_ptr + row * WINDOW + count % WINDOW, drawn)
        tl.store(count_ptr + row, count + 1)
        ended = (drawn < 0) | (drawn >= VOCABULARY) | (count + 1 >= tl.load(maximum_ptr + row))
        if ended:
            tl.store(finished_ptr + row, 1)
        else:
            position = tl.load(next_ptr + row)
            tl.store(position_ptr + row, position)
            tl.store(next_ptr + row, position + 1)
            x = tl.load(embedding_ptr + drawn * HIDDEN + k, mask=k < HIDDEN, other=0).to(tl.float32)
            if INT8:
                x *= tl.load(scale_ptr + drawn) * INT8_STEP
            tl.store(x_ptr + row * HIDDEN + k, x, mask=k < HIDDEN)
    if ended:  # what the pass does with this row must not reach its past, nor grow
        tl.store(position_ptr + row, -1)
        tl.store(x_ptr + row * HIDDEN + k, tl.zeros((HIDDEN_PADDED,), tl.float32), mask=k < HIDDEN)
