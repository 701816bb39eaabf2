"""Repetition-aware sampling (see `runtime.sampling`) and the bookkeeping of a step, one program a row.

The nucleus is put in order largest first, as in the plain sampler; draws are of uniform numbers that each request
brought. What can be in it is at least as large as the smallest of the `TOP_K` largest of many groups' largest weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cosyq.kernels.launch import Kernel, next_power_of_2
from cosyq.model.config import SamplingConfig

GROUPS, KEPT = 128, 64  # of weights; of those that may be in the nucleus, if they are no more
NOT_FINITE, IDLE = -1, -2  # in place of an id, as `runtime.batch` reads them

_draw = Kernel("draw", "draw")


@dataclass(frozen=True)
class Draws:
    """What the rows' draws are made from and leave, on the device.

    logits: float32 [rows, n].
    uniform: float32 [rows, longest, 2] in 0..1, for the n-th draw and for a second one where it repeats itself.
    recent: int64 [rows, window], -1 where there was none.
    count, minimum, maximum, next: int64 [rows]; next is the position that the next id takes.
    finished: uint8 [rows].
    drawn: int64 [rows], this step's: NOT_FINITE if the logits are not, IDLE for rows that have finished.
    kept: int64 [rows, KEPT], the kernel's own.
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
    kept: Tensor


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
    padded = next_power_of_2(n)
    extra: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    _draw[(rows,)](
        d.logits, d.uniform, d.recent, d.count, d.minimum, d.maximum, d.finished, d.next, d.drawn, d.kept,
        embedding, embedding if scales is None else scales, x, positions,
        N=n, PADDED=padded, VOCABULARY=vocabulary, TOP_K=min(config.top_k, n), TOP_P=config.top_p,
        SLOTS=next_power_of_2(config.top_k), WINDOW=config.win_size,
        WINDOW_PADDED=next_power_of_2(config.win_size), MOST_REPEATS=config.win_size * config.tau_r,
        LONGEST=d.uniform.shape[1], HIDDEN=hidden, HIDDEN_PADDED=next_power_of_2(hidden),
        INT8=scales is not None, GROUPS=min(GROUPS, padded), KEPT=KEPT, PDL=pdl, num_warps=8, **extra,
    )  # fmt: skip
