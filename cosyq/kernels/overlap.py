"""Programmatic dependent launch (CUDA, compute capability 9.0): a kernel begins while the one before it still runs.

Nothing that another kernel wrote may be read before `wait`, behind which all earlier kernels of the stream are over, if
each of them has waited itself. `let_next_start` lets the next one begin once all programs have come to it, or ended.
Where it comes behind `wait`, at most one kernel waits; and that one may read at once, past the first-level cache
(`.cg`), what any but the kernel in front wrote.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def overlapping(device: torch.device) -> dict[str, Any]:
    """How to launch a kernel so that it starts while the one before it ends, where the device can."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@triton.jit
def wait(PDL: tl.constexpr):
    if PDL:
        gdc_wait()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
