"""The build half: a float weight in, the tensors of a format and the error they make out.

bitsandbytes does the quantization itself, so that the bytes are the ones its own modules would hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosyq.quantize.backend import bitsandbytes
from cosyq.quantize.formats import (
    FLOAT_DTYPES,
    NESTED_BLOCKSIZE,
    Format,
    dequantize,
    dequantize_rows,
    encode_state,
    state_key,
)

ROWS_AT_ONCE = 1 << 23  # elements; rows are independent in int8, and a text embedding has 136 M


def pack(weight: Tensor, fmt: Format, device: torch.device) -> tuple[dict[str, Tensor], float]:
    """Pack `weight` (any float dtype, on the host) on `device`.

    Returns the stored tensors on the host and the relative RMS error |dequantized - weight| / |weight|.

    Raises:
        OverflowError: the format cannot hold a value of the weight, or the weight is not finite.
    """
    if fmt.name == "int8":
        return _pack_rows(weight, device)
    source = weight.to(device).float()
    if not torch.isfinite(source).all():  # a packed block would hide it
        raise OverflowError("a value is not finite")
    packed = _pack_blocks(source, fmt) if fmt.is_four_bit else {"weight": source.to(FLOAT_DTYPES[fmt.name])}
    error = relative_error(dequantize(fmt, packed, tuple(weight.shape)) - source, source)
    return {name: tensor.cpu() for name, tensor in packed.items()}, error


def _pack_rows(weight: Tensor, device: torch.device) -> tuple[dict[str, Tensor], float]:
    rows = max(ROWS_AT_ONCE // weight.shape[1], 1)
    codes, scales, squared_error, squared = [], [], 0.0, 0.0
    for part in weight.split(rows):
        source = part.to(device).float()
        half = source.half().contiguous()  # as bitsandbytes' own Int8Params does
        code, scale, _ = bitsandbytes().functional.int8_vectorwise_quant(half)
        code[scale == 0] = 0  # 0 / 0 inside
        difference = dequantize_rows(code, scale) - source
        squared_error += difference.double().square().sum().item()
        squared += source.double().square().sum().item()
        codes.append(code.cpu())
        scales.append(scale.cpu())
    packed = {
        "weight": torch.cat(codes),
        "SCB": torch.cat(scales),
        "weight_format": torch.zeros((), dtype=torch.uint8),
    }
    return packed, _ratio(squared_error, squared)


def _pack_blocks(source: Tensor, fmt: Format) -> dict[str, Tensor]:
    weight, state = bitsandbytes().functional.quantize_4bit(
        source, blocksize=fmt.blocksize, compress_statistics=fmt.double_quant, quant_type=fmt.name
    )
    offset = state.offset.item() if state.nested else None
    packed = {
        "weight": weight,
        "weight.absmax": state.absmax,
        "weight.quant_map": state.code,
        state_key(fmt): encode_state(fmt, tuple(source.shape), offset).to(source.device),
    }
    if state.nested:
        packed |= {"weight.nested_absmax": state.state2.absmax, "weight.nested_quant_map": state.state2.code}
    return packed


def nest(absmax: Tensor) -> tuple[dict[str, Tensor], float]:
    """The absmax of blocks, float32 [blocks], under double quantization: the tensors that hold them, and the offset."""
    offset = absmax.mean()
    codes, state = bitsandbytes().functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
    tensors = {"absmax": codes, "nested_absmax": state.absmax, "nested_quant_map": state.code}
    return {f"weight.{name}": tensor for name, tensor in tensors.items()}, offset.item()


def relative_error(difference: Tensor, source: Tensor) -> float:
    """|difference| / |source|, summed in float64.

    Raises:
        OverflowError: it is not finite.
    """
    return _ratio(difference.double().square().sum().item(), source.double().square().sum().item())


def _ratio(squared_error: float, squared: float) -> float:
    if not squared_error < float("inf"):
        raise OverflowError("a value is not finite, or too large for the format")
    return (squared_error / squared) ** 0.5 if squared > 0 else 0.0
