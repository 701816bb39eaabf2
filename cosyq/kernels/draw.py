"""Repetition-aware sampling (see `runtime.sampling`) and the bookkeeping of a step, one program a row.

The nucleus is found largest first, as in the plain sampler; draws are of uniform numbers that each request brought.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from cosyq.kernels.overlap import let_next_start, wait
from cosyq.kernels.packed import INT8_STEP
from cosyq.model.config import SamplingConfig

NOT_FINITE, IDLE = tl.constexpr(-1), tl.constexpr(-2)  # in place of an id, as `runtime.batch` reads them


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
def _draw(logits_ptr, uniform_ptr, recent_ptr, count_ptr, minimum_ptr, maximum_ptr, finished_ptr, next_ptr, drawn_ptr,
          embedding_ptr, scale_ptr, x_ptr, position_ptr,
          N: tl.constexpr, PADDED: tl.constexpr, VOCABULARY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
          SLOTS: tl.constexpr, WINDOW: tl.constexpr, WINDOW_PADDED: tl.constexpr, MOST_REPEATS: tl.constexpr,
          LONGEST: tl.constexpr, HIDDEN: tl.constexpr, HIDDEN_PADDED: tl.constexpr, INT8: tl.constexpr,
          PDL: tl.constexpr):  # fmt: skip
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
        top, top_ids = tl.zeros((SLOTS,), tl.float32), tl.zeros((SLOTS,), tl.int32)
        rest = (weights.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (PADDED - 1 - index)
        taken = 0
        before = 0.0
        while (taken < TOP_K) & (before < TOP_P):
            largest = tl.max(rest, 0)  # a positive float's bits are ordered as it is; the least id comes first
            best = (largest >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            where = PADDED - 1 - (largest & 0xFFFFFFFF).to(tl.int32)
            top = tl.where(slot == taken, best, top)
            top_ids = tl.where(slot == taken, where, top_ids)
            rest = tl.where(index == where, 0, rest)
            before += best
            taken += 1
        uniform = uniform_ptr + (row * LONGEST + tl.minimum(count, LONGEST - 1)) * 2
        chosen = _pick(top, slot, tl.load(uniform))
        drawn = tl.sum(tl.where(slot == chosen, top_ids, 0), 0)
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


@dataclass(frozen=True)
class Draws:
    """What the rows' draws are made from and leave, on the device.

    logits: float32 [rows, n].
    uniform: float32 [rows, longest, 2] in 0..1, for the n-th draw and for a second one where it repeats itself.
    recent: int64 [rows, window], -1 where there was none.
    count, minimum, maximum, next: int64 [rows]; next is the position that the next id takes.
    finished: uint8 [rows].
    drawn: int64 [rows], this step's: NOT_FINITE if the logits are not, IDLE for rows that have finished.
    """

    logits: Tensor
    uniform: Tensor
    recent: Tensor
    count: Tensor
    minimum: Tensor
    maximum: Tensor
    next: Tensor
    finished: Tensor
    drawn: Tensor


def draw(
    d: Draws,
    x: Tensor,
    positions: Tensor,
    embedding: Tensor,
    scales: Tensor | None,
    config: SamplingConfig,
    *,
    rows: int,
    vocabulary: int,
    pdl: bool,
) -> None:
    """Draw the next id of the first `rows`; x [rows, hidden] becomes its embedding, `positions` [rows] its place.

    Of a row that has finished they are zeros and -1.

    embedding: [n, hidden], int8 if there are scales, the rows' absmax [n].
    """
    n, hidden = d.logits.shape[1], x.shape[1]
    extra: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    _draw[(rows,)](
        d.logits, d.uniform, d.recent, d.count, d.minimum, d.maximum, d.finished, d.next, d.drawn,
        embedding, embedding if scales is None else scales, x, positions,
        N=n, PADDED=triton.next_power_of_2(n), VOCABULARY=vocabulary, TOP_K=min(config.top_k, n), TOP_P=config.top_p,
        SLOTS=triton.next_power_of_2(config.top_k), WINDOW=config.win_size,
        WINDOW_PADDED=triton.next_power_of_2(config.win_size), MOST_REPEATS=config.win_size * config.tau_r,
        LONGEST=d.uniform.shape[1], HIDDEN=hidden, HIDDEN_PADDED=triton.next_power_of_2(hidden),
        INT8=scales is not None, PDL=pdl, num_warps=8, **extra,
    )  # fmt: skip
