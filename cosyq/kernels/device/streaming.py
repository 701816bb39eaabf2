"""How a kernel writes a signal that comes in chunks, see `cosyq.kernels.streaming`."""

from __future__ import annotations

import triton
import triton.language as tl

from cosyq.kernels import streaming

FRAMES, FIRST, FINAL, NOISE = (tl.constexpr(i) for i in range(streaming.COUNTS))  # places in counts
_TAIL = tl.constexpr(streaming.MARGIN)


@triton.jit
def emit(y, first_row, columns, n, past, buffer, tail_in, tail_out, C: tl.constexpr, BT: tl.constexpr):
    """Store the tile y of rows first_row .. + BT behind the past, and what of it the next chunk needs."""
    rows = first_row + tl.arange(0, BT)
    at = rows[:, None] * C + columns[None, :]
    value = y.to(buffer.dtype.element_ty)
    tl.store(buffer + at, value, mask=(rows < n)[:, None])
    tl.store(tail_out + at + (past - n) * C, value, mask=((rows < n) & (rows >= n - past))[:, None])
    if first_row == 0:
        kept = tl.arange(0, _TAIL)
        past_at = kept[:, None] * C + columns[None, :]
        old = tl.load(tail_in + past_at, mask=(kept < past)[:, None], other=0.0)
        tl.store(buffer + past_at - past * C, old, mask=(kept < past)[:, None])
        tl.store(tail_out + past_at - n * C, old, mask=((kept < past) & (kept >= n))[:, None])
