"""The flow's products of int8 weights as they are stored with inputs that are rounded to int8 too.

Every row of inputs has a scale of its own, as in LLM.int8() (arXiv 2208.07339), so that the sums are whole numbers and
exact: what is lost is the rounding of the inputs, and nothing has to be unpacked.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cosyq.kernels.overlap import let_next_start, overlapping, wait
from cosyq.kernels.packed import INT8_STEP

ROWS, WIDTH, OUTPUTS = 128, 256, 128  # what the numbers of rows, of their columns and of outputs are multiples of
# Rows, outputs and columns of a tile, warps, stages, and how many tiles there must be: of these, the first.
TILES = ((128, 128, 128, 8, 3, 132), (64, 128, 128, 4, 4, 96), (64, 64, 256, 4, 4, 0))
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
def _times_codes(
    x, x_scales, weight, weight_scales, bias, out,
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
    y = total.to(tl.float32) * tl.load(x_scales + rows)[:, None] * scale[None, :] + added[None, :]
    if GELU:
        y = _gelu(y)
    out.store([m, n], y.to(out.dtype))


def fits(outputs: int, width: int) -> bool:
    return outputs % OUTPUTS == 0 and width % WIDTH == 0


def times_codes(
    x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], bias: Tensor, out: Tensor, *, gelu: bool = False
) -> None:
    """out [rows, outputs] = inputs times weights, plus bias, and GELU of it.

    x: int8 [rows, width], and what a code of each row is, float32. weight: int8 [outputs, width], and the rows' absmax,
    float32. Sizes are multiples of `ROWS`, `WIDTH` and `OUTPUTS`; codes begin at a multiple of 16 bytes.
    """
    (codes, scales), (weights, absmax) = x, weight
    rows, outputs = out.shape
    bm, bn, bk, warps, stages, _ = next(t for t in TILES if rows // t[0] * (outputs // t[1]) >= t[5])
    _times_codes[(rows // bm, outputs // bn)](
        TensorDescriptor.from_tensor(codes, [bm, bk]), scales, TensorDescriptor.from_tensor(weights, [bn, bk]), absmax,
        bias, TensorDescriptor.from_tensor(out, [bm, bn]),
        WIDTH=codes.shape[1], GELU=gelu, BM=bm, BN=bn, BK=bk, num_warps=warps, num_stages=stages,
        **overlapping(out.device),
    )  # fmt: skip
