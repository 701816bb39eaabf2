"""Weights as the artifact stores them, for kernels: rows of int8, of 4-bit blocks, or of plain numbers.

A kernel fetches a tile of codes, decodes it in registers and multiplies it by activations: no unpacked weight is ever
written to memory. Blocks lie within rows (`quantize.plan` sees to it), so rows of several layers can be stacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cosyq.kernels.launch import next_power_of_2

INT8, FOUR_BIT, NESTED, FLOAT = range(4)
NESTED_BLOCKS = 256  # blocks of the absmax that share a scale


@dataclass(frozen=True)
class Packed:
    """Rows of weights on the device.

    weight: INT8 int8 [n, k]; FOUR_BIT and NESTED uint8 [n * k / 2], the first of two in the high nibble; FLOAT [n, k].
    scales: INT8 the rows' absmax, float32 [n]; FOUR_BIT the blocks', float32 [n * k / block]; NESTED uint8 codes of it.
    table: the 16 values of a 4-bit code, float32.
    groups: NESTED: (scale, offset) of every 256 blocks, float32 [groups, 2].
    code: NESTED: the 256 values of an absmax code, float32.
    bias: float32 [n] or None.
    lookup: 4 bits on a GPU: the table as instructions, see `lookup`.
    dot: codes on a GPU: the product of a word of them as instructions, see `dot`.
    """

    kind: int
    n: int
    k: int
    block: int
    weight: Tensor
    scales: Tensor
    table: Tensor
    groups: Tensor
    code: Tensor
    bias: Tensor | None = None
    lookup: str = ""
    dot: str = ""

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        return self.weight, self.scales, self.table, self.groups, self.code


def int8_rows(weight: Tensor, scales: Tensor, bias: Tensor | None) -> Packed:
    n, k = weight.shape
    instructions = INT8_DOT if weight.is_cuda else ""
    return Packed(INT8, n, k, 1, weight, scales, scales, scales, scales, bias, dot=instructions)


def float_rows(weight: Tensor, bias: Tensor | None) -> Packed:
    n, k = weight.shape
    return Packed(FLOAT, n, k, 1, weight, weight, weight, weight, weight, bias)


def four_bit_rows(
    weight: Tensor,
    absmax: Tensor,
    table: Tensor,
    nested: tuple[Tensor, Tensor, float] | None,
    shape: Sequence[int],
    block: int,
    bias: Tensor | None,
) -> Packed:
    """nested is (absmax [groups], code [256], offset) under double quantization.

    Raises:
        ValueError: blocks cross rows.
    """
    n, k = shape
    instructions = (lookup(table.tolist()), dot(table.tolist())) if weight.is_cuda else ("", "")
    if k % block:
        raise ValueError(f"blocks of {block} cross rows of {k}")
    if nested is None:
        return Packed(FOUR_BIT, n, k, block, weight.view(-1), absmax, table, absmax, absmax, bias, *instructions)
    scale, code, offset = nested
    groups = torch.stack([scale, torch.full_like(scale, offset)], dim=1)
    return Packed(NESTED, n, k, block, weight.view(-1), absmax, table, groups, code, bias, *instructions)


def stacked(parts: Sequence[Packed]) -> Packed | None:
    """The rows of all parts as one, or None where they differ in more than rows, or groups of blocks are not whole.

    A part without a bias counts as one with zeros where another has one.
    """
    first = parts[0]
    whole = all(p.n * p.k // p.block % NESTED_BLOCKS == 0 for p in parts[:-1])
    same = all(
        (p.kind, p.k, p.block, p.weight.dtype) == (first.kind, first.k, first.block, first.weight.dtype) for p in parts
    )
    tables = first.kind in (INT8, FLOAT) or all(
        torch.equal(p.table, first.table) and (p.kind != NESTED or torch.equal(p.code, first.code)) for p in parts
    )
    if not same or not tables or (first.kind == NESTED and not whole):
        return None

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(p, name) for p in parts])

    weight = joined("weight")
    scales = weight if first.kind == FLOAT else joined("scales")
    bias = None
    if any(p.bias is not None for p in parts):
        zeros = [torch.zeros(p.n, device=weight.device) if p.bias is None else p.bias for p in parts]
        bias = torch.cat(zeros)
    groups = joined("groups") if first.kind == NESTED else scales
    table = scales if first.kind in (INT8, FLOAT) else first.table
    code = first.code if first.kind == NESTED else scales
    return Packed(
        first.kind,
        sum(p.n for p in parts),
        first.k,
        first.block,
        weight,
        scales,
        table,
        groups,
        code,
        bias,
        first.lookup,
        first.dot,
    )


def parts_of(k: int, block: int) -> tuple[int, int]:
    """Two powers of two, in elements, that cover k with little to spare; the second may be 0."""
    first = 1 << (k.bit_length() - 1)
    rest = k - first
    return first, 0 if rest == 0 else max(next_power_of_2(rest), block)


# A word of four codes times four inputs, as in `dot`: the high bytes $3, the low ones $4.
INT8_DOT = "dp4a.s32.s32 $0, $2, $3, 0; dp4a.s32.s32 $1, $2, $4, 0;"
LEVELS = 32639  # of inputs and of 4-bit values, as two signed bytes: 127 * 256 + 127


def _picked(codes: str, high: Sequence[int], low: Sequence[int]) -> Iterator[list[str]]:
    """PTX that leaves bytes of a table's values in h and l, for the first four of eight codes, then for the others.

    codes: the register of them. high, low: a byte each of the table's 16 values.
    """

    def word(plane: Sequence[int], first: int) -> str:
        return "0x" + "".join(f"{plane[first + i] & 255:02x}" for i in (3, 2, 1, 0))

    lines = [
        ".reg .b32 s, m, k, a, b, h, l;",
        f"and.b32 s, {codes}, 0x77777777;",
        f"shr.b32 m, {codes}, 3;",
        "and.b32 m, m, 0x11111111;",
    ]
    for half in (0, 1):
        if half:
            lines = ["shr.b32 s, s, 16;", "shr.b32 m, m, 16;"]
        lines.append("prmt.b32 k, 0x0000ff00, 0, m;")
        for plane, name in ((high, "h"), (low, "l")):
            w = [word(plane, first) for first in (0, 4, 8, 12)]
            lines += [
                f"mov.b32 a, {w[0]};",
                f"prmt.b32 a, a, {w[1]}, s;",
                f"mov.b32 b, {w[2]};",
                f"prmt.b32 b, b, {w[3]}, s;",
                f"lop3.b32 {name}, a, b, k, 0xd8;",  # b where k, a elsewhere
            ]
        yield lines


def dot(table: Sequence[float]) -> str:
    """PTX that multiplies a word of eight 4-bit codes by eight inputs in pairs of bytes: $0 * 256 + $1.

    As in `lookup`, but a value is two signed bytes and `dp4a` takes four of one byte at once. $2 are the codes, $3 and
    $4 the inputs' high bytes, $5 and $6 their low ones, of two neighbours the second first.
    """
    levels = [round(value * LEVELS) for value in table]
    high = [(level + 128) >> 8 for level in levels]
    low = [level - 256 * byte for level, byte in zip(levels, high, strict=True)]

    lines = []
    for half, picked in enumerate(_picked("$2", high, low)):
        lines += picked
        sums = ("0", "0") if half == 0 else ("t", "u")
        lines += [
            f"dp4a.s32.s32 t, h, ${3 + half}, {sums[0]};",
            f"dp4a.s32.s32 u, h, ${5 + half}, {sums[1]};",
            f"dp4a.s32.s32 u, l, ${3 + half}, u;",
        ]
    lines += ["mov.b32 $0, t;", "mov.b32 $1, u;"]
    return "{ .reg .b32 t, u; " + " ".join(lines) + " }"


def lookup(table: Sequence[float]) -> str:
    """PTX that turns four bytes of codes into eight values in float16, of which two of the 16 table's.

    A load a code keeps the load units busier than the weights do. `prmt` picks four bytes of eight by four nibbles
    at once, so two of them and a choice by the top bit look up a byte of four values; a float16 has two bytes.
    """
    halves = torch.tensor(table, dtype=torch.float16).view(torch.uint8).view(16, 2)
    lines = []
    for half, picked in enumerate(_picked("$4", halves[:, 1].tolist(), halves[:, 0].tolist())):
        lines += picked
        lines += [f"prmt.b32 ${half}, l, h, 0x7351;", f"prmt.b32 ${2 + half}, l, h, 0x6240;"]
    return "{ " + " ".join(lines) + " }"
