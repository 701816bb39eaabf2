"""What can be stored of a packed weight, for those who choose codes and absmax themselves: a grid of values.

A weight [out, in] is blocks of columns: row r of block b holds `levels[cells[r, column]] * absmax[r, b]`. int8 is one
block a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cosyq.quantize.formats import INT8_STEP, NESTED_BLOCKSIZE, Format, block_scales, decode_offset, state_key


@dataclass(frozen=True)
class _Nested:
    """What absmax are made of under double quantization: values ascending [256], their codes, a scale for each absmax
    [out, blocks], the offset."""

    values: Tensor
    codes: Tensor
    scales: Tensor
    offset: float

    def nearest(self, absmax: Tensor, blocks: int | slice) -> tuple[Tensor, Tensor]:
        """Of absmax in these blocks: the codes, and what they stand for."""
        scale = self.scales[:, blocks].contiguous()
        wanted = (absmax - self.offset) / torch.where(scale == 0, 1, scale)
        index = torch.bucketize(wanted, (self.values[1:] + self.values[:-1]) / 2)
        return self.codes[index], self.values[index] * scale + self.offset


@dataclass(frozen=True)
class Grid:
    """Of one weight, all on one device.

    tensors: as packed; what can be chosen anew is their codes and absmax.
    levels, codes: what codes stand for beside an absmax of 1, ascending [levels], and the codes.
    block: columns that share an absmax.
    """

    format: Format
    shape: tuple[int, int]
    tensors: dict[str, Tensor]
    levels: Tensor
    codes: Tensor
    block: int
    nested: _Nested | None

    @classmethod
    def of(cls, tensors: dict[str, Tensor], fmt: Format, shape: tuple[int, int]) -> Grid:
        """Of packed tensors.

        Raises:
            ValueError: a row is not whole blocks, or the tensors contradict themselves.
        """
        out, width = shape
        if fmt.name == "int8":
            codes = torch.arange(-127, 128, device=tensors["weight"].device)
            return cls(fmt, shape, tensors, codes * INT8_STEP, codes.to(torch.int8), width, None)
        assert fmt.blocksize is not None
        if width % fmt.blocksize:
            raise ValueError(f"rows of {width} are not whole blocks of {fmt.blocksize}")
        levels, order = tensors["weight.quant_map"].sort(stable=True)
        nested = None
        if fmt.double_quant:
            values, places = tensors["weight.nested_quant_map"].sort(stable=True)
            blocks = width // fmt.blocksize
            scales = tensors["weight.nested_absmax"].repeat_interleave(NESTED_BLOCKSIZE)[: out * blocks]
            offset = decode_offset(fmt, shape, tensors[state_key(fmt)])
            nested = _Nested(values, places.to(torch.uint8), scales.view(out, blocks), offset)
        return cls(fmt, shape, tensors, levels, order.to(torch.uint8), fmt.blocksize, nested)

    def chosen(self) -> tuple[Tensor, Tensor]:
        """What the tensors hold, as `stored` takes it: cells [out, in] and absmax [out, blocks]."""
        tensors = self.tensors
        if self.format.name == "int8":
            return tensors["weight"].long() - int(self.codes[0]), tensors["SCB"][:, None]
        pairs = tensors["weight"].long()
        codes = torch.cat([pairs >> 4, pairs & 15], dim=1).view(self.shape)
        nested = None
        if self.nested is not None:
            nested = (tensors["weight.nested_absmax"], tensors["weight.nested_quant_map"], self.nested.offset)
        absmax = block_scales(tensors["weight.absmax"], nested)
        return self.codes.argsort()[codes], absmax.view(self.shape[0], -1)

    def nearest(self, wanted: Tensor, absmax: Tensor) -> Tensor:
        """The cells nearest to what is wanted beside these absmax, broadcast."""
        between = (self.levels[1:] + self.levels[:-1]) / 2
        return torch.bucketize(wanted / torch.where(absmax == 0, 1, absmax), between)

    def possible(self, absmax: Tensor, blocks: int | slice) -> Tensor:
        """The absmax nearest to these that such blocks can have."""
        return absmax if self.nested is None else self.nested.nearest(absmax, blocks)[1]

    def stored(self, cells: Tensor, absmax: Tensor) -> dict[str, Tensor]:
        """The tensors with the codes of these cells [out, in] and the absmax nearest to these [out, blocks]."""
        return self.tensors | self._cells(cells) | self._absmax(absmax)

    def _cells(self, cells: Tensor) -> dict[str, Tensor]:
        codes = self.codes[cells]
        if self.format.name == "int8":
            return {"weight": codes}
        pairs = codes.view(-1, 2)
        return {"weight": pairs[:, :1] << 4 | pairs[:, 1:]}

    def _absmax(self, absmax: Tensor) -> dict[str, Tensor]:
        if self.format.name == "int8":
            return {"SCB": absmax[:, 0].contiguous()}
        if self.nested is None:
            return {"weight.absmax": absmax.reshape(-1)}
        return {"weight.absmax": self.nested.nearest(absmax, slice(None))[0].reshape(-1)}
