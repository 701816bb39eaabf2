"""The run half: modules that hold packed tensors and multiply by them.

`DequantLinear` unpacks on the fly and multiplies in the activations' dtype: weight-only, any device, the
oracle. `Int8Linear` and `FourBitLinear` hand the same bytes to bitsandbytes' own multiply, for comparison;
only they import it. `DequantLinear.unpacked` trades memory for speed: the weight unpacked once. `RowsLinear` hands
rows of int8 to torch's own kernel for a CPU.

The packed tensors are kept in a plain dict and not as parameters or buffers: no `.to(dtype)` can reach
the scales, which must stay float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyq.quantize.backend import bitsandbytes
from cosyq.quantize.formats import (
    INT8_STEP,
    Format,
    block_scales,
    decode_offset,
    dequantize_blocks,
    dequantize_rows,
    state_key,
)

Matmul = Literal["dequantize", "unpacked", "native", "bitsandbytes"]
OUTLIER_THRESHOLD = 6.0  # LLM.int8()'s published default
FEW = 8  # rows of inputs up to which torch's int8 kernel beats a product in bfloat16
KERNEL_WIDTH = 32  # that kernel reads past the end of rows that are no multiple of 16


class PackedLinear(nn.Module):
    """A linear layer over packed tensors; x [..., in] -> [..., out] in x's dtype."""

    def __init__(self, fmt: Format, shape: tuple[int, int], tensors: dict[str, Tensor], bias: Tensor | None):
        super().__init__()
        self.format, self.shape, self.bias = fmt, torch.Size(shape), bias
        self.packed = tensors

    def extra_repr(self) -> str:
        return f"{self.shape[1]} -> {self.shape[0]}, {self.format}"


class DequantLinear(PackedLinear):
    def __init__(self, fmt: Format, shape: tuple[int, int], tensors: dict[str, Tensor], bias: Tensor | None):
        super().__init__(fmt, shape, tensors, bias)
        self.offset = decode_offset(fmt, shape, tensors[state_key(fmt)]) if fmt.double_quant else 0.0

    def weight(self) -> Tensor:
        """float32 [out, in]."""
        t, fmt = self.packed, self.format
        if fmt.name == "int8":
            return dequantize_rows(t["weight"], t["SCB"])
        assert fmt.blocksize is not None
        nested = (t["weight.nested_absmax"], t["weight.nested_quant_map"], self.offset) if fmt.double_quant else None
        scales = block_scales(t["weight.absmax"], nested)
        return dequantize_blocks(t["weight"], t["weight.quant_map"], scales, fmt.blocksize, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight().to(x.dtype), self.bias)

    def unpacked(self, dtype: torch.dtype) -> nn.Linear:
        """The same layer for inputs in `dtype`, to the bit, with the weight unpacked for good."""
        linear = nn.Linear(self.shape[1], self.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight().to(dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias, requires_grad=False)
        return linear


class RowsLinear(PackedLinear):
    """torch's weight-only product for rows of int8 on a CPU: a token's step reads a byte a weight.

    Inputs and sums are rounded to bfloat16, scales are not; a row of inputs gives the same whatever is beside it, up to
    `FEW` of them.
    """

    def __init__(self, fmt: Format, shape: tuple[int, int], tensors: dict[str, Tensor], bias: Tensor | None):
        super().__init__(fmt, shape, tensors, bias)
        self._ones = torch.ones(shape[0], dtype=torch.bfloat16)
        self._scales = tensors["SCB"] * INT8_STEP
        self._bias = None if bias is None else bias.float()

    @staticmethod
    def fits(fmt: Format, width: int, device: torch.device) -> bool:
        return fmt.name == "int8" and width % KERNEL_WIDTH == 0 and device.type == "cpu"

    def forward(self, x: Tensor) -> Tensor:
        rows, codes = x.reshape(-1, self.shape[1]).bfloat16(), self.packed["weight"]
        if len(rows) <= FEW or not multiplies_bfloat16():
            sums = torch._weight_int8pack_mm(rows, codes, self._ones)
        else:
            sums = F.linear(rows, codes.bfloat16())
        out = sums * self._scales if self._bias is None else torch.addcmul(self._bias, sums, self._scales)
        return out.to(x.dtype).view(*x.shape[:-1], self.shape[0])


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has units for products of bfloat16; without them float32 is faster."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Int8Linear(PackedLinear):
    """bitsandbytes' LLM.int8(): activations are quantized too, outliers above the threshold are not."""

    def forward(self, x: Tensor) -> Tensor:
        bnb = bitsandbytes()
        state = bnb.MatmulLtState()
        state.CB, state.SCB = self.packed["weight"], self.packed["SCB"]
        state.threshold, state.has_fp16_weights = OUTLIER_THRESHOLD, False
        # It computes in float16 whatever it gets, and says so at every call unless it is given that.
        bias = self.bias.half() if self.bias is not None else None
        return bnb.matmul(x.half(), state.CB, bias=bias, state=state).to(x.dtype)


class FourBitLinear(PackedLinear):
    """bitsandbytes' 4-bit product: weights unpacked inside the kernel, activations as they are."""

    def __init__(self, fmt: Format, shape: tuple[int, int], tensors: dict[str, Tensor], bias: Tensor | None):
        super().__init__(fmt, shape, tensors, bias)
        parts = {name.removeprefix("weight."): t for name, t in tensors.items() if name != "weight"}
        self.state: Any = bitsandbytes().functional.QuantState.from_dict(parts, device=tensors["weight"].device)

    def forward(self, x: Tensor) -> Tensor:
        return bitsandbytes().matmul_4bit(x, self.packed["weight"].t(), bias=self.bias, quant_state=self.state)


class PackedEmbedding(nn.Module):
    """Rows in int8 with an absmax each; ids [...] -> float32 [..., width]."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        self.packed = tensors

    def forward(self, ids: Tensor) -> Tensor:
        return dequantize_rows(self.packed["weight"][ids], self.packed["SCB"][ids])


def weight_bytes(network: nn.Module) -> int:
    """What a network's tensors take, packed or not, where they are."""
    packed = [m.packed.values() for m in network.modules() if isinstance(m, PackedLinear | PackedEmbedding)]
    tensors = [*network.parameters(), *network.buffers(), *(tensor for layer in packed for tensor in layer)]
    return sum(tensor.nbytes for tensor in tensors)


def packed_linear(
    fmt: Format,
    shape: tuple[int, int],
    tensors: dict[str, Tensor],
    bias: Tensor | None,
    *,
    matmul: Matmul,
    dtype: torch.dtype,
) -> nn.Module:
    """The module that multiplies inputs in `dtype` by `tensors` (as in `formats.stored_tensors`) in the chosen way."""
    if matmul == "native" and RowsLinear.fits(fmt, shape[1], tensors["weight"].device):
        return RowsLinear(fmt, shape, tensors, bias)
    if matmul != "bitsandbytes":
        layer = DequantLinear(fmt, shape, tensors, bias)
        return layer if matmul == "dequantize" else layer.unpacked(dtype)
    kind = Int8Linear if fmt.name == "int8" else FourBitLinear
    return kind(fmt, shape, tensors, bias)
