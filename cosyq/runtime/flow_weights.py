"""A flow's weights as its fast engine takes them: a block's matrices, and how they are unpacked into scratch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
from torch import Tensor

from cosyq.kernels import dit as kernels
from cosyq.kernels.flow_products import fits
from cosyq.model.config import FlowConfig
from cosyq.quantize.linear import DequantLinear

# Of a block, what is unpacked together: before its first product, and beside its attention.
HALVES: dict[str, tuple[str, ...]] = {"attention": ("qkv", "out"), "feed-forward": ("up", "down")}
CODED = ("qkv", "up")  # what a norm comes before, and may be multiplied as it is stored
BESIDE: dict[str, tuple[str, ...]] = {"attention": (), "feed-forward": ("up", "down", "out")}  # if that takes codes


@dataclass(frozen=True)
class Codes:
    """A matrix that is multiplied as it is stored: int8 [outputs, width], and the rows' absmax, float32 [outputs]."""

    matrix: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, layers: Sequence[Any]) -> Codes:
        """Of layers in int8 with one input. It begins where its kernel can read it from."""
        first, *others = (layer.packed["weight"] for layer in layers)
        codes = torch.cat([first, *others]) if others or first.data_ptr() % 16 else first
        return cls((codes, torch.cat([layer.packed["SCB"] for layer in layers])))


@dataclass(frozen=True)
class PackedRun:
    """A flat run of packed weights: `scales` for equal parts of them; `levels` [16] if they are 4-bit.

    Under double quantization the scales are codes, and `nested` says of what, as `kernels.unpack_blocks` has it.
    """

    codes: Tensor
    scales: Tensor
    levels: Tensor | None = None
    nested: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, layer: DequantLinear) -> PackedRun:
        t, fmt = layer.packed, layer.format
        if fmt.name == "int8":
            return cls(t["weight"].view(-1), t["SCB"])
        nested = None
        if fmt.double_quant:
            spread = t["weight.nested_absmax"]
            groups = torch.stack([spread, torch.full_like(spread, layer.offset)], dim=1)
            nested = t["weight.nested_quant_map"], groups
        return cls(t["weight"].view(-1), t["weight.absmax"], t["weight.quant_map"], nested)

    @property
    def count(self) -> int:
        return self.codes.numel() * (1 if self.levels is None else 2)

    @property
    def run(self) -> int:
        return self.count // self.scales.numel()

    def followed_by(self, other: PackedRun) -> PackedRun | None:
        """Both as one, if they are of one kind and groups of scales are whole."""
        if not _same(self.levels, other.levels) or (self.nested is None) != (other.nested is None):
            return None
        codes = torch.cat([self.codes, other.codes])
        if self.nested is not None and other.nested is not None:
            whole = self.scales.numel() % kernels.NESTED_BLOCKSIZE == 0
            if not whole or self.run != other.run or not _same(self.nested[0], other.nested[0]):
                return None
            groups = torch.cat([self.nested[1], other.nested[1]])
            return PackedRun(codes, torch.cat([self.scales, other.scales]), self.levels, (self.nested[0], groups))
        run = gcd(self.run, other.run)
        scales = [p.scales.repeat_interleave(p.run // run) for p in (self, other)]
        return PackedRun(codes, torch.cat(scales), self.levels)

    def unpack(self, out: Tensor) -> None:
        if self.levels is None:
            kernels.unpack_rows(self.codes, self.scales, out)
        else:
            kernels.unpack_blocks(self.codes, self.scales, self.nested, self.levels, out)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


_Part = tuple[Tensor | PackedRun, Tensor]  # what to unpack, and where to


@dataclass(frozen=True)
class Block:
    """A transformer block. Matrices are its own, or places in the scratch that are valid once unpacked.

    Those whose inputs come from a norm may be codes.
    """

    qkv: Tensor | Codes
    out: Tensor
    up: Tensor | Codes
    down: Tensor
    qkv_bias: Tensor
    out_bias: Tensor
    up_bias: Tensor
    down_bias: Tensor
    parts: dict[str, tuple[_Part, ...]]

    @classmethod
    def of(cls, block: Any, config: FlowConfig, scratch: Tensor, *, coded: bool) -> Block:
        """coded: in int8 what can be is multiplied as it is stored, by inputs that are rounded to eight bits."""
        a, f = block.attn, block.ff
        groups = {"qkv": [a.to_q, a.to_k, a.to_v], "out": [a.to_out], "up": [f.up], "down": [f.down]}
        places = dict(zip(groups, (scratch[place] for place in scratch_places(config)), strict=True))
        codes = {name: Codes.of(groups[name]) for name in CODED if coded and _as_stored(groups[name])}
        found = {name: _matrix(groups[name], places[name]) for name in groups if name not in codes}
        matrices = {name: matrix for name, (matrix, _) in found.items()}
        return cls(
            codes.get("qkv") or matrices["qkv"],
            matrices["out"],
            codes.get("up") or matrices["up"],
            matrices["down"],
            torch.cat([a.to_q.bias, a.to_k.bias, a.to_v.bias]),
            a.to_out.bias,
            f.up.bias,
            f.down.bias,
            {
                half: _merged([part for name in names if name in found for part in found[name][1]])
                for half, names in (BESIDE if "qkv" in codes else HALVES).items()
            },
        )

    @property
    def halves(self) -> dict[str, tuple[str, ...]]:
        return BESIDE if isinstance(self.qkv, Codes) else HALVES

    @property
    def scratch_bytes(self) -> int:
        """What unpacking writes."""
        return sum(place.numel() * place.itemsize for parts in self.parts.values() for _, place in parts)

    def unpack(self, half: str) -> None:
        for source, place in self.parts[half]:
            _fill(place, source)

    def unpacked(self) -> Block:
        """The same, all matrices its own.

        They are not copied from the scratch: what is unpacked there next would not wait for the copy.
        """
        own: dict[str, Tensor] = {}
        for half, names in self.halves.items():
            places = [place for _, place in self.parts[half]]
            if not places:
                continue
            first = int(min(place.storage_offset() for place in places))
            last = int(max(place.storage_offset() + place.numel() for place in places))
            memory = places[0].new_empty(last - first)
            for source, place in self.parts[half]:
                _fill(_moved(place, first, memory), source)
            scratch = places[0].untyped_storage().data_ptr()
            matrices = {name: getattr(self, name) for name in names}
            own |= {
                name: _moved(matrix, first, memory)
                for name, matrix in matrices.items()
                if isinstance(matrix, Tensor) and matrix.untyped_storage().data_ptr() == scratch
            }
        return replace(self, **own, parts=dict.fromkeys(HALVES, ()))


def _moved(view: Tensor, first: int, memory: Tensor) -> Tensor:
    """A view of the scratch from its number `first` on, as the same view of `memory`."""
    start = view.storage_offset() - first
    return memory[start : start + view.numel()].view(view.shape)


def _fill(place: Tensor, source: Tensor | PackedRun) -> None:
    if isinstance(source, PackedRun):
        source.unpack(place)
    else:
        place.copy_(source)


def scratch_places(c: FlowConfig) -> list[slice]:
    """Where a block's matrices are in the scratch: queries, keys and values together, out, up, down.

    The last two may begin where the first was: they are unpacked after its product.
    """
    inner = c.heads * c.head_dim
    qkv, out, up, down = 3 * inner * c.dim, inner * c.dim, c.ff_dim * c.dim, c.dim * c.ff_dim
    start = max(up + down - qkv, 0)
    return [
        slice(start, start + qkv),
        slice(start + qkv, start + qkv + out),
        slice(0, up),
        slice(up, up + down),
    ]


def _as_stored(layers: Sequence[Any]) -> bool:
    """Whether layers with one input can be multiplied as they are stored."""
    whole = all(isinstance(layer, DequantLinear) and layer.format.name == "int8" for layer in layers)
    return whole and fits(sum(layer.shape[0] for layer in layers), layers[0].shape[1])


def _matrix(layers: Sequence[Any], place: Tensor) -> tuple[Tensor, list[_Part]]:
    """Layers with one input as one matrix [outputs, width], and what must be unpacked to fill it.

    Only if none is packed it is a matrix of its own.
    """
    if not any(isinstance(layer, DequantLinear) for layer in layers):
        return torch.cat([layer.weight.data for layer in layers]) if len(layers) > 1 else layers[0].weight.data, []
    parts: list[_Part] = []
    first = 0
    for layer in layers:
        source = PackedRun.of(layer) if isinstance(layer, DequantLinear) else layer.weight.data.view(-1)
        count = source.count if isinstance(source, PackedRun) else source.numel()
        parts.append((source, place[first : first + count]))
        first += count
    width = layers[0].shape[1] if isinstance(layers[0], DequantLinear) else layers[0].weight.shape[1]
    return place.view(-1, width), parts


def _merged(parts: Sequence[_Part]) -> tuple[_Part, ...]:
    """The same with neighbours of one kind made one, to be unpacked by one launch."""
    merged: list[_Part] = []
    for source, place in parts:
        before, start = merged[-1] if merged else (None, place)
        both = None
        if isinstance(before, PackedRun) and isinstance(source, PackedRun):
            adjacent = start.storage_offset() + start.numel() == place.storage_offset()
            both = before.followed_by(source) if adjacent else None
        if both is not None:
            merged[-1] = (both, start.as_strided((both.count,), (1,)))
        else:
            merged.append((source, place))
    return tuple(merged)


def convolutions(conv: Any) -> list[tuple[Tensor, Tensor]]:
    """Weights [groups, taps, in, out] and biases."""
    found = []
    for layer in (conv.conv1, conv.conv2):
        out, width, taps = layer.weight.shape
        weight = layer.weight.data.view(layer.groups, out // layer.groups, width, taps)
        found.append((weight.permute(0, 3, 2, 1).contiguous(), layer.bias.data))
    return found
