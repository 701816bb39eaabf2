"""Programmatic dependent launch (CUDA, compute capability 9.0): a kernel begins while the one before it still runs.

Nothing that another kernel wrote may be read before `wait`, behind which all earlier kernels of the stream are over, if
each of them has waited itself. `let_next_start` lets the next one begin once all programs have come to it, or ended.
Where it comes behind `wait`, at most one kernel waits; and that one may read at once, past the first-level cache
(`.cg`), what any but the kernel in front wrote.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait(PDL: tl.constexpr):
    if PDL:
        gdc_wait()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
