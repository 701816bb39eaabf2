"""The storage formats, as pure functions of (format, shape): what is stored, and what it means.

The packed ones are bitsandbytes' own, byte for byte and name for name:

- int8: LLM.int8() rows (arXiv 2208.07339). `weight` int8, `SCB` the rows' absmax, `weight_format` 0 for row-major.
- nf4, fp4: QLoRA blocks (arXiv 2305.14314). Two codes a byte in `weight`, the first in the high nibble; `absmax` a
  block, under double quantization itself in 8 bits with `nested_*`; a JSON in `quant_state.bitsandbytes__*`.

Nothing here needs bitsandbytes, and dequantization equals its result exactly.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor

from cosyq.model.inventory import Module

FormatName = Literal["int8", "nf4", "fp4", "bf16", "fp16", "fp32"]
FLOAT_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FOUR_BIT = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256  # blocks of the absmax that share one scale under double quantization
STATE_BYTES = 256  # the JSON is padded to this, so that a file's layout is known before anything is packed
INT8_STEP = 7.874015718698502e-3  # 1 / 127 as bitsandbytes writes it

Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Format:
    """How one module's weight is stored. `blocksize` and `double_quant` belong to the 4-bit formats only."""

    name: FormatName
    blocksize: int | None = None
    double_quant: bool | None = None

    @property
    def is_float(self) -> bool:
        return self.name in FLOAT_DTYPES

    @property
    def is_four_bit(self) -> bool:
        return self.name in FOUR_BIT

    def __str__(self) -> str:
        if not self.is_four_bit:
            return self.name
        return f"{self.name}/{self.blocksize}{'+dq' if self.double_quant else ''}"

    def to_dict(self) -> dict[str, Any]:
        extra = {"blocksize": self.blocksize, "double_quant": self.double_quant} if self.is_four_bit else {}
        return {"name": self.name, **extra}

    @classmethod
    def from_dict(cls, data: Any) -> Format:
        """Strict inverse of `to_dict`; raises ValueError."""
        if not isinstance(data, dict) or not isinstance(data.get("name"), str):
            raise ValueError(f"not a format: {data!r}")
        name, keys = data["name"], set(data)
        if name in FOUR_BIT:
            good = keys == {"name", "blocksize", "double_quant"} and isinstance(data["double_quant"], bool)
            if good and data["blocksize"] in BLOCKSIZES:
                return cls(name, data["blocksize"], data["double_quant"])
        elif keys == {"name"} and (name == "int8" or name in FLOAT_DTYPES):
            return cls(name)
        raise ValueError(f"not a format: {data!r}")


def four_bit(name: FormatName, blocksize: int = 64, double_quant: bool = True) -> Format:
    return Format(name, blocksize, double_quant)


def state_key(fmt: Format) -> str:
    return f"weight.quant_state.bitsandbytes__{fmt.name}"


def stored_tensors(fmt: Format, shape: tuple[int, ...]) -> Specs:
    """The tensors that hold a `weight` of `shape` in this format: name -> (dtype, shape).

    Raises:
        ValueError: a packed format was asked for something that is not a matrix.
    """
    if fmt.is_float:
        return {"weight": (FLOAT_DTYPES[fmt.name], shape)}
    if len(shape) != 2:
        raise ValueError(f"{fmt.name} packs matrices; the shape is {list(shape)}")
    if fmt.name == "int8":
        return {
            "weight": (torch.int8, shape),
            "SCB": (torch.float32, shape[:1]),
            "weight_format": (torch.uint8, ()),
        }
    assert fmt.blocksize is not None
    count = shape[0] * shape[1]
    blocks = ceil(count / fmt.blocksize)
    specs: Specs = {
        "weight": (torch.uint8, (ceil(count / 2), 1)),
        "weight.absmax": (torch.uint8 if fmt.double_quant else torch.float32, (blocks,)),
        "weight.quant_map": (torch.float32, (16,)),
        state_key(fmt): (torch.uint8, (STATE_BYTES,)),
    }
    if fmt.double_quant:
        specs["weight.nested_absmax"] = (torch.float32, (ceil(blocks / NESTED_BLOCKSIZE),))
        specs["weight.nested_quant_map"] = (torch.float32, (256,))
    return specs


def module_tensors(module: Module, fmt: Format) -> Specs:
    """What is stored for a module: its weight in the format, everything else in float32."""
    specs: Specs = {}
    for name, shape in module.parameters.items():
        if name == "weight" and module.kind != "exact":
            specs |= stored_tensors(fmt, shape)
        else:
            specs[name] = (torch.float32, shape)
    return specs


def stored_bytes(specs: Specs) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in specs.values())


def encode_state(fmt: Format, shape: tuple[int, ...], offset: float | None) -> Tensor:
    """bitsandbytes' JSON of what is not a tensor, as bytes: uint8 [STATE_BYTES], padded with spaces."""
    state: dict[str, Any] = {
        "quant_type": fmt.name,
        "blocksize": fmt.blocksize,
        "dtype": "float32",
        "shape": list(shape),
    }
    if fmt.double_quant:
        state |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": offset}
    text = json.dumps(state).encode().ljust(STATE_BYTES)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def decode_offset(fmt: Format, shape: tuple[int, ...], state: Tensor) -> float:
    """The absmax' offset from a stored state, after checking that it describes this very weight.

    Raises:
        ValueError: it does not.
    """
    try:
        data = json.loads(bytes(state.tolist()))
        expected = json.loads(bytes(encode_state(fmt, shape, data.get("nested_offset")).tolist()))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"unreadable quantization state: {error}") from None
    if data != expected:
        raise ValueError(f"quantization state {data} does not describe {fmt} {list(shape)}")
    offset = data.get("nested_offset", 0.0)
    if not isinstance(offset, float) or offset != offset or abs(offset) == float("inf"):
        raise ValueError(f"quantization state has offset {offset!r}")
    return offset


def dequantize_rows(weight: Tensor, scales: Tensor) -> Tensor:
    """int8 rows [..., width] and their absmax [...] -> float32 [..., width]."""
    return weight * scales.unsqueeze(-1) * INT8_STEP


def block_scales(absmax: Tensor, nested: tuple[Tensor, Tensor, float] | None) -> Tensor:
    """The blocks' absmax, float32 [blocks]; `nested` is (absmax, code [256], offset) under double quantization."""
    if nested is None:
        return absmax
    scales, code, offset = nested
    spread = scales.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()]
    return code[absmax.int()] * spread + offset


def dequantize_blocks(codes: Tensor, quant_map: Tensor, scales: Tensor, blocksize: int, shape: torch.Size) -> Tensor:
    """Packed 4-bit codes uint8 [n/2, 1] and scales float32 [blocks] -> float32 of `shape`."""
    packed = codes.view(-1).int()
    values = torch.stack([quant_map[packed >> 4], quant_map[packed & 15]], dim=-1).view(-1)
    count, whole = shape.numel(), (shape.numel() // blocksize) * blocksize
    if whole == count:
        return (values.view(-1, blocksize) * scales[:, None]).view(shape)
    body = (values[:whole].view(-1, blocksize) * scales[: whole // blocksize, None]).view(-1)
    return torch.cat([body, values[whole:count] * scales[-1]]).view(shape)


def dequantize(fmt: Format, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """The weight that `tensors` (as in `stored_tensors`) stand for, float32 of `shape`."""
    if fmt.is_float:
        return tensors["weight"].float()
    if fmt.name == "int8":
        return dequantize_rows(tensors["weight"], tensors["SCB"])
    assert fmt.blocksize is not None
    nested = None
    if fmt.double_quant:
        offset = decode_offset(fmt, shape, tensors[state_key(fmt)])
        nested = (tensors["weight.nested_absmax"], tensors["weight.nested_quant_map"], offset)
    scales = block_scales(tensors["weight.absmax"], nested)
    return dequantize_blocks(tensors["weight"], tensors["weight.quant_map"], scales, fmt.blocksize, torch.Size(shape))
