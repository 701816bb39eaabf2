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
import triton
import triton.language as tl
from torch import Tensor

from cosyq.kernels.flow_products import rounded_rows
from cosyq.kernels.overlap import let_next_start, overlapping, wait
from cosyq.kernels.packed import INT8_STEP

TILE = 64
EVERYWHERE = 1 << 30
KEYS = 64  # taken at a time by attention
NESTED_BLOCKSIZE = 256  # as `quantize.formats` has it
LOG2_E = 1.4426950408889634


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


@triton.jit
def _end_behind(PDL: tl.constexpr):
    """For a kernel that reads nothing of the one before it: it does not end before that one."""
    if tl.program_id(0) == 0:
        wait(PDL)


@triton.jit
def _unpack_rows(
    codes, scales, out, pieces, RUN: tl.constexpr, PIECE: tl.constexpr, COUNT: tl.constexpr, PDL: tl.constexpr
):
    piece = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    there = piece < pieces
    scale = tl.load(scales + piece * PIECE // RUN, mask=there, other=0.0)[:, None]
    at = piece[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
    code = tl.load(codes + at, mask=there[:, None], other=0, eviction_policy="evict_first").to(tl.float32)
    tl.store(out + at, (code * scale * INT8_STEP).to(out.dtype.element_ty), mask=there[:, None])
    _end_behind(PDL)


def unpack_rows(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """int8 codes [n] and absmax of equal runs of them, float32, to out [n] in its type.

    Does not wait for the kernel before it, which must neither write the codes nor read `out`.
    """
    run = codes.numel() // scales.numel()
    piece = min(run & -run, 4096)  # a power of two, with one scale
    pieces, count = codes.numel() // piece, 4096 // piece
    _unpack_rows[(triton.cdiv(pieces, count),)](
        codes, scales, out, pieces, RUN=run, PIECE=piece, COUNT=count, num_warps=4, **overlapping(out.device)
    )


@triton.jit
def _unpack_blocks(
    codes, scales, code, groups, levels, out, blocks,
    NESTED: tl.constexpr, RUN: tl.constexpr, COUNT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    there = block < blocks
    scale = tl.load(scales + block, mask=there, other=0)
    if NESTED:
        group = groups + block // NESTED * 2
        spread, offset = tl.load(group, mask=there, other=0.0), tl.load(group + 1, mask=there, other=0.0)
        scale = tl.load(code + scale.to(tl.int32)) * spread + offset
    at = block[:, None] * (RUN // 2) + tl.arange(0, RUN // 2)[None, :]
    pair = tl.load(codes + at, mask=there[:, None], other=0, eviction_policy="evict_first").to(tl.int32)
    high, low = tl.load(levels + (pair >> 4)), tl.load(levels + (pair & 15))
    values = tl.interleave(high * scale[:, None], low * scale[:, None]).to(out.dtype.element_ty)
    tl.store(out + block[:, None] * RUN + tl.arange(0, RUN)[None, :], values, mask=there[:, None])
    _end_behind(PDL)


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
    _unpack_blocks[(triton.cdiv(blocks, count),)](
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


@triton.jit
def _add_norm(
    residual, y, gate, scale, shift, out, scales,
    ADD: tl.constexpr, CODES: tl.constexpr, EPS: tl.constexpr,
    DIM: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, SIZE)[None, :]
    there = at < DIM
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = row[:, None].to(tl.int64) * DIM + at
    wait(PDL)
    let_next_start(PDL)
    x = tl.load(residual + place, mask=there, other=0.0)
    if ADD:
        x += tl.load(gate + at, mask=there, other=0.0) * tl.load(y + place, mask=there, other=0.0).to(tl.float32)
        tl.store(residual + place, x, mask=there)
    centred = tl.where(there, x - (tl.sum(x, 1) / DIM)[:, None], 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 1) / DIM + EPS)[:, None]
    moved = normed * (1 + tl.load(scale + at, mask=there, other=0.0)) + tl.load(shift + at, mask=there, other=0.0)
    if CODES:
        codes, steps = rounded_rows(moved)
        tl.store(out + place, codes, mask=there)
        tl.store(scales + row, steps)
    else:
        tl.store(out + place, moved.to(out.dtype.element_ty), mask=there)


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
        DIM=dim, ROWS=2, SIZE=triton.next_power_of_2(dim), num_warps=4, **overlapping(residual.device),
    )  # fmt: skip


@triton.jit
def _rotate(
    qkv, cos, sin, tiles, pasts, half,
    INNER: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    part: tl.constexpr = TILE // ROWS
    index = tl.program_id(0) // part
    tile = tiles + index * 4
    first, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    start -= tl.load(pasts + index * 4).to(tl.int32)
    branch = tl.program_id(2).to(tl.int64) * half
    rows = (first + tl.program_id(0) % part * ROWS + tl.arange(0, ROWS))[:, None]
    live = rows < end
    place = (rows - start) * (D // 2) + tl.arange(0, D // 2)[None, :]
    c, s = tl.load(cos + place, mask=live, other=0.0), tl.load(sin + place, mask=live, other=0.0)
    wait(PDL)
    let_next_start(PDL)
    at = qkv + (branch + rows) * (3 * INNER) + tl.program_id(1) * INNER + tl.arange(0, D)[None, :]
    even, odd = tl.split(tl.load(at, mask=live, other=0.0).to(tl.float32).reshape(ROWS, D // 2, 2))
    turned = tl.interleave(even * c - odd * s, odd * c + even * s)
    tl.store(at, turned.to(qkv.dtype.element_ty), mask=live)


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


@triton.jit
def _segment(address, frames, step, KEPT: tl.constexpr, TAILS: tl.constexpr, dtype: tl.constexpr):
    """What a segment has of a step: TAILS numbers, and KEPT of each frame."""
    place = address.to(tl.pointer_type(dtype)) + step * (TAILS + frames.to(tl.int64) * KEPT)
    return tl.multiple_of(place, 16)


@triton.jit
def _attend_keys(
    q, keys, values, state, limit, begin, stop, stride: tl.constexpr, scale,
    MASKED: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Keys `begin` to `stop`; unless MASKED, whole groups of KEYS that every row sees."""
    acc, most, total = state
    channel = tl.arange(0, D)
    for first in range(begin, stop, KEYS):
        at = first + tl.arange(0, KEYS)
        if MASKED:
            k = tl.load(keys + at[None, :] * stride + channel[:, None], mask=(at < stop)[None, :], other=0.0)
        else:
            k = tl.load(keys + at[None, :] * stride + channel[:, None])
        score = tl.dot(q, k)
        if MASKED:
            score = tl.where(at[None, :] < limit[:, None], score, float("-inf"))
        highest = tl.maximum(most, tl.max(score, 1) * scale)
        p = tl.exp2(score * scale - highest[:, None])
        fade = tl.exp2(most - highest)
        total = total * fade + tl.sum(p, 1)
        if MASKED:
            v = tl.load(values + at[:, None] * stride + channel[None, :], mask=(at < stop)[:, None], other=0.0)
        else:
            v = tl.load(values + at[:, None] * stride + channel[None, :])
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None])
        most = highest
    return acc, most, total


@triton.jit(do_not_specialize=["layer"])
def _attend(
    qkv, out, tiles, pasts, now, layer, half, scale,
    KEPT: tl.constexpr, TAILS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    KEYS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 4
    first, start, end, block = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    head = tl.program_id(1)
    branch = tl.program_id(2).to(tl.int64) * half
    if first < end:
        stride: tl.constexpr = 3 * HEADS * D
        queries = qkv + branch * stride + head * D
        keys = queries + HEADS * D
        values = keys + HEADS * D
        rows = first + tl.arange(0, TILE)
        channel = tl.arange(0, D)
        live = (rows < end)[:, None]
        wait(PDL)
        let_next_start(PDL)
        q = tl.load(queries + rows[:, None] * stride + channel[None, :], mask=live, other=0.0)
        # A row sees to the end of its block: the tile's first row what all rows see, its last one the most.
        limit = tl.minimum(end, start + ((rows - start) // block + 1) * block)
        shared = tl.minimum(end, start + ((first - start) // block + 1) * block)
        last = tl.minimum(end, first + TILE) - 1
        stop = tl.minimum(end, start + ((last - start) // block + 1) * block)
        whole = start + (shared - start) // KEYS * KEYS
        lowest = tl.full([TILE], float("-inf"), tl.float32)
        state = (tl.zeros([TILE, D], tl.float32), lowest, tl.zeros([TILE], tl.float32))
        wide: tl.constexpr = 2 * HEADS * D
        mine = (layer * 2 + tl.program_id(2)).to(tl.int64) * wide  # for each frame of a segment
        step, past = tl.load(now + 1), pasts + tl.program_id(0) * 4
        into = tl.load(past + 3)
        if into != 0:
            kept = _segment(into, end - start, step, KEPT, TAILS, qkv.dtype.element_ty)
            kept += TAILS + mine * (end - start) + head * D + channel[None, :] + (rows - start)[:, None] * wide
            own = rows[:, None] * stride + channel[None, :]
            tl.store(kept, tl.load(keys + own, mask=live), mask=live)
            tl.store(kept + HEADS * D, tl.load(values + own, mask=live), mask=live)
        segments = tl.load(past + 2).to(tl.pointer_type(tl.int64))
        for index in range(0, tl.load(past + 1).to(tl.int32)):
            frames = tl.load(segments + 2 * index).to(tl.int32)
            k = _segment(tl.load(segments + 2 * index + 1), frames, step, KEPT, TAILS, qkv.dtype.element_ty)
            k += TAILS + mine * frames + head * D
            v, all_of_it, groups = k + HEADS * D, tl.zeros([TILE], tl.int32) + frames, frames // KEYS * KEYS
            state = _attend_keys(q, k, v, state, all_of_it, 0, groups, wide, scale, False, D, KEYS)
            state = _attend_keys(q, k, v, state, all_of_it, groups, frames, wide, scale, True, D, KEYS)
        state = _attend_keys(q, keys, values, state, limit, start, whole, stride, scale, False, D, KEYS)
        state = _attend_keys(q, keys, values, state, limit, whole, stop, stride, scale, True, D, KEYS)
        acc, _, total = state
        target = out + (branch + rows[:, None]) * (HEADS * D) + head * D + channel[None, :]
        tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=live)


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


@triton.jit
def _mish(x):
    """x tanh(log(1 + e^x))."""
    e = tl.exp(tl.minimum(x, 20.0))  # from there on it is x
    n = e * (e + 2)
    return x * n / (n + 2)


@triton.jit
def _conv_mish(
    x, weight, bias, before, out, tiles, pasts, now, half,
    WHICH: tl.constexpr, ADD: tl.constexpr, KEPT: tl.constexpr, TAILS: tl.constexpr, DIM: tl.constexpr,
    GROUP: tl.constexpr, TAPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 4
    first, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    group = tl.program_id(1)
    branch = tl.program_id(2).to(tl.int64) * half
    if first < end:
        rows = first + tl.arange(0, TILE)
        channel = tl.arange(0, GROUP)
        source = x + branch * DIM + group * GROUP + channel[None, :]
        matrix = weight + group * (TAPS * GROUP * GROUP) + channel[:, None] * GROUP + channel[None, :]
        acc = tl.zeros([TILE, GROUP], tl.float32)
        tail = (WHICH * 2 + tl.program_id(2)) * ((TAPS - 1) * DIM) + group * GROUP + channel[None, :]
        step, past = tl.load(now + 1), pasts + tl.program_id(0) * 4
        count = tl.load(past + 1)
        if (first == start) & (count > 0):
            newest = tl.load(past + 2).to(tl.pointer_type(tl.int64)) + 2 * (count - 1)
            kept = _segment(tl.load(newest + 1), tl.load(newest), step, KEPT, TAILS, x.dtype.element_ty) + tail
            for tap in range(TAPS - 1):
                seen = tl.arange(0, TILE) + tap
                a = tl.load(kept + seen[:, None] * DIM, mask=(seen < TAPS - 1)[:, None], other=0.0)
                acc = tl.dot(a, tl.load(matrix + tap * (GROUP * GROUP)), acc)
        into = tl.load(past + 3)
        if into != 0:
            kept = _segment(into, end - start, step, KEPT, TAILS, x.dtype.element_ty) + tail
            place = rows - end + TAPS - 1
            last = ((place >= 0) & (rows < end))[:, None]
            tl.store(kept + place[:, None] * DIM, tl.load(source + rows[:, None] * DIM, mask=last), mask=last)
        for tap in range(TAPS):
            seen = rows + (tap - TAPS + 1)
            a = tl.load(source + seen[:, None] * DIM, mask=((seen >= start) & (seen < end))[:, None], other=0.0)
            acc = tl.dot(a, tl.load(matrix + tap * (GROUP * GROUP)), acc)
        y = _mish(acc + tl.load(bias + group * GROUP + channel).to(tl.float32)[None, :])
        at = (branch + rows[:, None]) * DIM + group * GROUP + channel[None, :]
        live = (rows < end)[:, None]
        if ADD:
            y += tl.load(before + at, mask=live, other=0.0).to(tl.float32)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=live)


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


@triton.jit
def _enter(
    x, given, noise, encoded, voices, prompts, tiles, entries, now,
    RATIO: tl.constexpr, MEL: tl.constexpr, TOKEN: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile, entry = tiles + tl.program_id(0) * 4, entries + tl.program_id(0) * 5
    first, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    half = tl.load(now + 2)
    frame, token, prompt = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    shown, voice = tl.load(entry + 3), tl.load(entry + 4)
    rows = (first + tl.arange(0, TILE))[:, None]
    at = tl.arange(0, SIZE)[None, :]
    place, live, conditional = rows - start, rows < end, tl.program_id(1) == 0
    mel, told = live & (at < MEL), live & (at < TOKEN) & conditional
    begun = tl.load(noise + (frame + place) * MEL + at, mask=mel)
    tl.store(x + rows * MEL + at, begun, mask=mel & conditional)
    known = tl.load(prompts + (prompt + place) * MEL + at, mask=mel & conditional & (place < shown), other=0.0)
    tokens = tl.load(encoded + (token + place // RATIO) * TOKEN + at, mask=told, other=0.0)
    speaker = tl.load(voices + voice * MEL + at, mask=(at < MEL) & conditional, other=0.0)
    into = given + (tl.program_id(1) * half + rows) * (3 * MEL + TOKEN) + at
    tl.store(into, begun.to(given.dtype.element_ty), mask=mel)
    tl.store(into + MEL, known.to(given.dtype.element_ty), mask=mel)
    tl.store(into + 2 * MEL, tokens.to(given.dtype.element_ty), mask=live & (at < TOKEN))
    tl.store(into + 2 * MEL + TOKEN, (speaker + tl.zeros_like(begun)).to(given.dtype.element_ty), mask=mel)


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
        RATIO=ratio, MEL=mel, TOKEN=token, SIZE=triton.next_power_of_2(max(mel, token)), TILE=TILE, num_warps=4,
    )  # fmt: skip


@triton.jit
def _begin_step(now, table, row, width, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(row + at, tl.load(table + tl.load(now) * width + at, mask=at < width), mask=at < width)


def begin_step(now: Tensor, table: Tensor, row: Tensor) -> None:
    """Of table [any, width] the step's row, to `row`."""
    size = 1024
    _begin_step[(triton.cdiv(row.numel(), size),)](now, table, row, row.numel(), SIZE=size, num_warps=4)


@triton.jit
def _guide(
    x, velocity, given, dt, now, half, guidance,
    MEL: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    at = tl.arange(0, SIZE)[None, :]
    there = (rows < half) & (at < MEL)
    conditional = tl.load(velocity + rows * MEL + at, mask=there).to(tl.float32)
    free = tl.load(velocity + (half + rows) * MEL + at, mask=there).to(tl.float32)
    moved = tl.load(x + rows * MEL + at, mask=there) + tl.load(dt) * ((1 + guidance) * conditional - guidance * free)
    tl.store(x + rows * MEL + at, moved, mask=there)
    rounded = moved.to(given.dtype.element_ty)
    tl.store(given + rows * WIDTH + at, rounded, mask=there)
    tl.store(given + (half + rows) * WIDTH + at, rounded, mask=there)
    if tl.program_id(0) == 0:
        tl.store(now, tl.load(now) + 1)
        tl.store(now + 1, tl.load(now + 1) + 1)


def guide(x: Tensor, velocity: Tensor, given: Tensor, dt: Tensor, now: Tensor, guidance: float) -> None:
    """One Euler step of the guided velocity: x [half, mel] float32 moves on, and into the first columns of `given`.

    velocity [2 * half, mel]; given [2 * half, any]; dt float32, one number on the device. Then it is the
    next step's turn.
    """
    half, mel = x.shape
    _guide[(triton.cdiv(half, 8),)](
        x, velocity, given, dt, now, half, guidance,
        MEL=mel, WIDTH=given.shape[1], ROWS=8, SIZE=triton.next_power_of_2(mel), num_warps=4,
    )  # fmt: skip
