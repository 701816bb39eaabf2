"""Products of int8 codes, see `cosyq.kernels.flow_products`."""

from __future__ import annotations

import triton
import triton.language as tl

from cosyq.kernels.device.overlap import let_next_start, wait
from cosyq.kernels.device.packed import INT8_STEP

LARGEST, SMALLEST = tl.constexpr(127.0), tl.constexpr(1e-30)
WHOLE = tl.constexpr(1.5 * 2**23)  # a float32 plus this has no place for a fraction


@triton.jit
def rounded_rows(x):
    """Rows of float32 [n, width] as int8 codes and a scale each."""
    step = tl.maximum(tl.max(tl.abs(x), 1), SMALLEST) / LARGEST
    return ((x * (1.0 / step)[:, None] + WHOLE) - WHOLE).to(tl.int8), step


@triton.jit
def _gelu(x):
    """By tanh: x / (1 + e^-2u), which is x (1 + tanh u) / 2."""
    return x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def times_codes_kernel(
    x, x_scales, weight, weight_scales, bias, out, count,
    WIDTH: tl.constexpr, GELU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    rows, outputs = m + tl.arange(0, BM), n + tl.arange(0, BN)
    scale = tl.load(weight_scales + outputs) * INT8_STEP
    added = tl.load(bias + outputs).to(tl.float32)
    wait(PDL)
    let_next_start(PDL)
    total = tl.zeros((BM, BN), tl.int32)
    for k in range(0, WIDTH, BK):
        total = tl.dot(x.load([m, k]), weight.load([n, k]).T, total, out_dtype=tl.int32)
    steps = tl.load(x_scales + rows, mask=rows < count, other=0.0)
    y = total.to(tl.float32) * steps[:, None] * scale[None, :] + added[None, :]
    if GELU:
        y = _gelu(y)
    out.store([m, n], y.to(out.dtype))
