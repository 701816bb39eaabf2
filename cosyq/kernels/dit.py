"""The diffusion transformer's kernels, and the one product that torch has under another name.

Rows are frames. The conditional branches of all sequences lie one after another in the first half of every array, the
unconditional ones in the same order in the second. What depends on a frame's place in its sequence reads a table of
tiles of `TILE` rows, int32 [n, 4]: a tile's first row, its sequence's first row and end, all counted in a half, and how
many frames make a block of block-causal attention (`EVERYWHERE`: all see all). A tile that begins at its end is empty.
Rows after the last sequence of a half hold anything, and nothing that is read depends on them.

A sequence may go on from frames that are not there any more, and leave its own to what will go on from it. What is kept
of frames that follow each other is a segment, of the type of the rows: at each step, one after another, the last rows
that each convolution read [2, branches, taps - 1, dim], then keys beside values [layers, branches, frames, 2 * heads *
d]. `Pasts.table`, int64 [n, 4], says of every tile how many frames came before its sequence, in how many segments,
where the list of these is (frames and address of each), and the address of one for its sequence's own rows, or 0. A
sequence's rows see all that came before it.

What a step differs by is chosen on the device, so that the same launches can follow one another: `now`, int64 [3], is
the step's row of the modulation table, and its number, which `guide` counts on; and how many rows a half has.

Products take operands of the weights' type, on a GPU sixteen bits; sums, norms and softmax are float32.

Under programmatic dependent launch (`PDL`) a kernel starts while the one before it ends: what that one wrote is read
after `wait`, and `let_next_start` comes after it, so that whatever came before the one before is over for the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cosyq.kernels.launch import Kernel, cdiv, next_power_of_2
from cosyq.kernels.overlap import overlapping

TILE = 64
EVERYWHERE = 1 << 30
KEYS = 64  # taken at a time by attention
NESTED_BLOCKSIZE = 256  # as `quantize.formats` has it
LOG2_E = 1.4426950408889634

_unpack_rows = Kernel("dit", "unpack_rows")
_unpack_blocks = Kernel("dit", "unpack_blocks")
_add_norm = Kernel("dit", "add_norm")
_rotate = Kernel("dit", "rotate")
_attend = Kernel("dit", "attend")
_conv_mish = Kernel("dit", "conv_mish")
_enter = Kernel("dit", "enter")
_begin_step = Kernel("dit", "begin_step")
_guide = Kernel("dit", "guide")


def tile_table(lengths: Sequence[int], blocks: Sequence[int], tiles: int) -> Tensor:
    """The tiles of sequences of `lengths` frames and `blocks`, and empty ones up to `tiles`; on the host."""
    table, start = [], 0
    for length, block in zip(lengths, blocks, strict=True):
        table += [(first, start, start + length, block) for first in range(start, start + length, TILE)]
        start += length
    return torch.tensor(table + [(0, 0, 0, 1)] * (tiles - len(table)), dtype=torch.int32)


@dataclass(frozen=True)
class Pasts:
    """What sequences go on from, and leave, at one of the steps.

    table: int64 [tiles, 4], see above.
    now: as above.
    tails, frame: how many numbers of a step a segment has of what was convolved, and of each frame's keys and values.
    """

    table: Tensor
    now: Tensor
    tails: int
    frame: int


def unpack_rows(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """int8 codes [n] and absmax of equal runs of them, float32, to out [n] in its type.

    Does not wait for the kernel before it, which must neither write the codes nor read `out`.
    """
    run = codes.numel() // scales.numel()
    piece = min(run & -run, 4096)  # a power of two, with one scale
    pieces, count = codes.numel() // piece, 4096 // piece
    _unpack_rows[(cdiv(pieces, count),)](
        codes, scales, out, pieces, RUN=run, PIECE=piece, COUNT=count, num_warps=4, **overlapping(out.device)
    )


def unpack_blocks(
    codes: Tensor, scales: Tensor, nested: tuple[Tensor, Tensor] | None, levels: Tensor, out: Tensor
) -> None:
    """4-bit codes, two a byte [n / 2], of equal blocks, and their sixteen levels, float32, to out [n] in its type.

    scales: the blocks' absmax, float32; under double quantization uint8 codes of it, and `nested` is the values of
    those, float32 [256], and scale and offset of every 256 blocks, float32 [groups, 2]. Does not wait either.
    """
    blocks, run = scales.numel(), 2 * codes.numel() // scales.numel()
    code, groups = nested if nested is not None else (levels, levels)
    count = max(4096 // run, 1)
    _unpack_blocks[(cdiv(blocks, count),)](
        codes, scales, code, groups, levels, out, blocks,
        NESTED=NESTED_BLOCKSIZE if nested is not None else 0, RUN=run, COUNT=count, num_warps=4,
        **overlapping(out.device),
    )  # fmt: skip


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """GELU by tanh of a linear layer; cuBLAS has it in one, for which torch's name is not public."""
    if x.is_cuda:
        torch._addmm_activation(bias, x, weight.T, use_gelu=True, out=out)
    else:
        out.copy_(F.gelu(F.linear(x, weight, bias), approximate="tanh"))


def add_norm(
    residual: Tensor,
    added: tuple[Tensor, Tensor] | None,
    scale: Tensor,
    shift: Tensor,
    out: Tensor | tuple[Tensor, Tensor],
    eps: float,
) -> None:
    """`added` = (gate [dim], y [rows, dim]): residual [rows, dim] float32 += gate * y; out = its modulated norm.

    out: [rows, dim], or int8 codes of it and what a code of each row is, float32 [rows]. The number of rows is even.
    """
    rows, dim = residual.shape
    gate, y = added if added is not None else (scale, residual)
    place, scales = out if isinstance(out, tuple) else (out, residual)
    _add_norm[(rows // 2,)](
        residual, y, gate, scale, shift, place, scales,
        ADD=added is not None, CODES=isinstance(out, tuple), EPS=eps,
        DIM=dim, ROWS=2, SIZE=next_power_of_2(dim), num_warps=4, **overlapping(residual.device),
    )  # fmt: skip


def rotate(qkv: Tensor, rope: tuple[Tensor, Tensor], tiles: Tensor, pasts: Pasts) -> None:
    """Turn head 0 of queries and keys in place, the only one that learns of positions (see `model.dit.rotate_first`).

    qkv [rows, 3 * heads * d]; `rope` is cosines and sines of interleaved pairs, [positions, d / 2] float32.
    """
    rows, width = qkv.shape
    d, part = 2 * rope[0].shape[1], 16
    _rotate[(tiles.shape[0] * (TILE // part), 2, 2)](
        qkv, *rope, tiles, pasts.table, rows // 2,
        INNER=width // 3, D=d, TILE=TILE, ROWS=part, num_warps=4, **overlapping(qkv.device),
    )  # fmt: skip


def attend(qkv: Tensor, tiles: Tensor, pasts: Pasts, out: Tensor, *, layer: int, heads: int) -> None:
    """Attention of each sequence to its past and to itself, as far as its blocks let it; its keys and values are kept.

    qkv [rows, 3 * heads * d], out [rows, heads * d].
    """
    rows, inner = out.shape
    d = inner // heads
    _attend[(tiles.shape[0], heads, 2)](
        qkv, out, tiles, pasts.table, pasts.now, layer, rows // 2, LOG2_E / d**0.5,
        KEPT=pasts.frame, TAILS=pasts.tails, HEADS=heads, D=d, TILE=TILE, KEYS=KEYS,
        num_warps=4, num_stages=3, **overlapping(qkv.device),
    )  # fmt: skip


def conv_mish(
    x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None, tiles: Tensor, pasts: Pasts, out: Tensor,
    *, which: int,
) -> None:  # fmt: skip
    """Mish of a causal grouped convolution of each sequence, plus `before`; all [rows, dim]. What it reads is kept.

    weight [groups, taps, in, out], the last tap the frame itself. `which` of the two convolutions it is.
    """
    groups, taps, group, _ = weight.shape
    rows, dim = x.shape
    _conv_mish[(tiles.shape[0], groups, 2)](
        x, weight, bias, x if before is None else before, out, tiles, pasts.table, pasts.now, rows // 2,
        WHICH=which, ADD=before is not None, KEPT=pasts.frame, TAILS=pasts.tails,
        DIM=dim, GROUP=group, TAPS=taps, TILE=TILE, num_warps=4, num_stages=3,
    )  # fmt: skip


def enter(
    x: Tensor, given: Tensor, noise: Tensor, encoded: Tensor, voices: Tensor, prompts: Tensor,
    tiles: Tensor, entries: Tensor, now: Tensor, *, ratio: int,
) -> None:  # fmt: skip
    """What the estimator is given at first: x [half, mel] and given [2 * half, mel + mel + token + mel].

    noise [frames, mel], encoded [tokens, token], voices [utterances, mel], prompts [any, mel], all float32. `entries`,
    int32 [n, 5], says of a tile's sequence: the frame, the token and the row of `prompts` that it begins with, how many
    of its rows have a prompt, and its voice. `ratio` frames have a token. How many rows a half has says `now`.
    """
    mel, token = x.shape[1], encoded.shape[1]
    _enter[(tiles.shape[0], 2)](
        x, given, noise, encoded, voices, prompts, tiles, entries, now,
        RATIO=ratio, MEL=mel, TOKEN=token, SIZE=next_power_of_2(max(mel, token)), TILE=TILE, num_warps=4,
    )  # fmt: skip


def begin_step(now: Tensor, table: Tensor, row: Tensor) -> None:
    """Of table [any, width] the step's row, to `row`."""
    size = 1024
    _begin_step[(cdiv(row.numel(), size),)](now, table, row, row.numel(), SIZE=size, num_warps=4)


def guide(x: Tensor, velocity: Tensor, given: Tensor, dt: Tensor, now: Tensor, guidance: float) -> None:
    """One Euler step of the guided velocity: x [half, mel] float32 moves on, and into the first columns of `given`.

    velocity [2 * half, mel]; given [2 * half, any]; dt float32, one number on the device. Then it is the
    next step's turn.
    """
    half, mel = x.shape
    _guide[(cdiv(half, 8),)](
        x, velocity, given, dt, now, half, guidance,
        MEL=mel, WIDTH=given.shape[1], ROWS=8, SIZE=next_power_of_2(mel), num_warps=4,
    )  # fmt: skip
