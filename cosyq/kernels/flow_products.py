"""The flow's products of int8 weights as they are stored with inputs that are rounded to int8 too.

Every row of inputs has a scale of its own, as in LLM.int8() (arXiv 2208.07339), so that the sums are whole numbers and
exact: what is lost is the rounding of the inputs, and nothing has to be unpacked.
"""

from __future__ import annotations

from torch import Tensor

from cosyq.kernels.launch import Kernel, cdiv
from cosyq.kernels.overlap import overlapping

WIDTH, OUTPUTS = 256, 128  # what the numbers of columns and of outputs are multiples of
# Rows, outputs and columns of a tile, warps, stages, and how many tiles there must be: of these, the first.
TILES = ((128, 128, 128, 8, 3, 132), (64, 128, 128, 4, 4, 96), (64, 64, 256, 4, 4, 0))

_times_codes = Kernel("flow_products", "times_codes")


def fits(outputs: int, width: int) -> bool:
    return outputs % OUTPUTS == 0 and width % WIDTH == 0


def times_codes(
    x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], bias: Tensor, out: Tensor, *, gelu: bool = False
) -> None:
    """out [rows, outputs] = inputs times weights, plus bias, and GELU of it.

    x: int8 [rows, width], and what a code of each row is, float32. weight: int8 [outputs, width], and the rows' absmax,
    float32. Sizes are multiples of `WIDTH` and `OUTPUTS`; codes begin at a multiple of 16 bytes.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    (codes, scales), (weights, absmax) = x, weight
    rows, outputs = out.shape
    bm, bn, bk, warps, stages, _ = next(t for t in TILES if cdiv(rows, t[0]) * (outputs // t[1]) >= t[5])
    _times_codes[(cdiv(rows, bm), outputs // bn)](
        TensorDescriptor.from_tensor(codes, [bm, bk]), scales, TensorDescriptor.from_tensor(weights, [bn, bk]), absmax,
        bias, TensorDescriptor.from_tensor(out, [bm, bn]), rows,
        WIDTH=codes.shape[1], GELU=gelu, BM=bm, BN=bn, BK=bk, num_warps=warps, num_stages=stages,
        **overlapping(out.device),
    )  # fmt: skip
