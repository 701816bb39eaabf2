"""Weights as the artifact stores them, for kernels: rows of int8, of 4-bit blocks, or of plain numbers.

A kernel fetches a tile of codes, decodes it in registers and multiplies it by activations: no unpacked weight is ever
written to memory. Blocks lie within rows (`quantize.plan` sees to it), so rows of several layers can be stacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
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
    dot: codes on a GPU, which are multiplied as integers.
    planes: 4 bits: the table in bytes, see `planes`.
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
    dot: bool = False
    planes: Tensor | None = None

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        return self.weight, self.scales, self.table, self.groups, self.code


def int8_rows(weight: Tensor, scales: Tensor, bias: Tensor | None) -> Packed:
    n, k = weight.shape
    return Packed(INT8, n, k, 1, weight, scales, scales, scales, scales, bias, dot=weight.is_cuda)


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
    if k % block:
        raise ValueError(f"blocks of {block} cross rows of {k}")
    on_gpu: tuple[Any, ...] = ()
    if weight.is_cuda:
        values = tuple(table.tolist())
        on_gpu = lookup(values), True, planes(values, weight.device)
        if nested is not None:
            nested = nested[0], shared(tuple(nested[1].tolist()), weight.device), nested[2]
    if nested is None:
        return Packed(FOUR_BIT, n, k, block, weight.view(-1), absmax, table, absmax, absmax, bias, *on_gpu)
    scale, code, offset = nested
    groups = torch.stack([scale, torch.full_like(scale, offset)], dim=1)
    return Packed(NESTED, n, k, block, weight.view(-1), absmax, table, groups, code, bias, *on_gpu)


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
        first.planes,
    )


def parts_of(k: int, block: int) -> tuple[int, int]:
    """Two powers of two, in elements, that cover k with little to spare; the second may be 0."""
    first = 1 << (k.bit_length() - 1)
    rest = k - first
    return first, 0 if rest == 0 else max(next_power_of_2(rest), block)


LEVELS = 32639  # of inputs, as two signed bytes: 127 * 256 + 127
STEPS = 16383  # from -1 to 1, of 4-bit values, as two bytes without their signs: 127 * 128 + 127

# What a kernel multiplies codes by, as instructions. From four inputs, whole numbers behind the point of floats, their
# low bytes, $0, and their high ones, $1, which are of numbers larger by 128, for a low byte has a sign.
IN_BYTES = """{ .reg .b32 a, b, c, d;
prmt.b32 a, $2, $3, 0x0040; prmt.b32 b, $4, $5, 0x0040; prmt.b32 $0, a, b, 0x5410;
add.s32 a, $2, 128; add.s32 b, $3, 128; add.s32 c, $4, 128; add.s32 d, $5, 128;
prmt.b32 a, a, b, 0x0051; prmt.b32 b, c, d, 0x0051; prmt.b32 $1, a, b, 0x5410; }"""
# A word of four codes of int8 times four inputs: their high bytes $3, the low ones $4. $0 * 256 + $1.
INT8_DOT = "dp4a.s32.s32 $0, $2, $3, 0; dp4a.s32.s32 $1, $2, $4, 0;"
# Eight 4-bit codes, $4, looked up: the values' high bytes in $0 and $1, low ones in $2 and $3, of the first four and of
# the others, of two neighbours the second first. A value v is (v + 1) / 2 in twice 7 bits: where a nibble's top bit is
# set, `prmt` picks the sign of a byte, which is 0 here, so each half of the table leaves zeros for the codes of the
# other, and `or` joins them. High bytes are picked from $5 to $8, low ones from $9 to $12, see `planes`.
FOUR_BIT_VALUES = """{ .reg .b32 c, o, a, b;
xor.b32 o, $4, 0x88888888; shr.b32 c, $4, 16;
prmt.b32 a, $5, $6, $4; prmt.b32 b, $7, $8, o; or.b32 $0, a, b;
prmt.b32 a, $9, $10, $4; prmt.b32 b, $11, $12, o; or.b32 $2, a, b;
shr.b32 o, o, 16;
prmt.b32 a, $5, $6, c; prmt.b32 b, $7, $8, o; or.b32 $1, a, b;
prmt.b32 a, $9, $10, c; prmt.b32 b, $11, $12, o; or.b32 $3, a, b; }"""
# These values, $1 to $4, times eight inputs: high bytes $5 and $6, low ones $7 and $8. The
# product by 128; that of two low bytes is left out.
FOUR_BIT_DOT = """{ .reg .b32 t, u, w;
dp4a.s32.s32 t, $1, $5, 0; dp4a.s32.s32 u, $1, $7, 0; dp4a.s32.s32 w, $3, $5, 0;
dp4a.s32.s32 t, $2, $6, t; dp4a.s32.s32 u, $2, $8, u; dp4a.s32.s32 w, $4, $6, w;
mad.lo.s32 u, t, 256, u; mad.lo.s32 $0, w, 2, u; }"""
# The sums of eight inputs' high bytes, $2 and $3, and of their low ones, $4 and $5.
SUM_OF_BYTES = """{ dp4a.s32.s32 $0, $2, 0x01010101, 0; dp4a.s32.s32 $0, $3, 0x01010101, $0;
dp4a.s32.s32 $1, $4, 0x01010101, 0; dp4a.s32.s32 $1, $5, 0x01010101, $1; }"""
# $1, not known to be the same in all threads, which it is as $2 is 0: what a compiler knows to be the same it keeps
# where `prmt` cannot read it, and moves for each.
OWN = "{ .reg .b32 a; mov.u32 a, %laneid; and.b32 a, a, $2; xor.b32 $0, $1, a; }"


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


@cache
def shared(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32, one for all layers that look up the same: it is used so often that it stays in the GPU's cache."""
    return torch.tensor(values, device=device)


@cache
def planes(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The 16 values as FOUR_BIT_VALUES takes them, int32 [9]: their high bytes, four in a word, low ones, and 0."""
    levels = ((torch.tensor(values) + 1) * (STEPS / 2)).round().int()
    words = torch.cat([levels >> 7, levels & 127]).to(torch.uint8).view(torch.int32)
    return F.pad(words, (0, 1)).to(device)


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
