"""The diffusion transformer's kernels, see `cosyq.kernels.dit`."""

from __future__ import annotations

import triton
import triton.language as tl

from cosyq.kernels.device.flow_products import rounded_rows
from cosyq.kernels.device.overlap import let_next_start, wait
from cosyq.kernels.device.packed import INT8_STEP

FAR = tl.constexpr(2.0**100)  # sums of weights up to it are finite, and of them times values
FEW = tl.constexpr(32)  # keys taken at a time where a running maximum is needed, so that registers do
OWN = tl.constexpr(8)  # sums of a row's weights that are kept apart, as threads have them


@triton.jit
def _end_behind(PDL: tl.constexpr):
    """For a kernel that reads nothing of the one before it: it does not end before that one."""
    if tl.program_id(0) == 0:
        wait(PDL)


@triton.jit
def unpack_rows_kernel(
    codes, scales, out, pieces, RUN: tl.constexpr, PIECE: tl.constexpr, COUNT: tl.constexpr, PDL: tl.constexpr
):
    piece = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    there = piece < pieces
    scale = tl.load(scales + piece * PIECE // RUN, mask=there, other=0.0)[:, None]
    at = piece[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
    code = tl.load(codes + at, mask=there[:, None], other=0, eviction_policy="evict_first").to(tl.float32)
    tl.store(out + at, (code * scale * INT8_STEP).to(out.dtype.element_ty), mask=there[:, None])
    _end_behind(PDL)


@triton.jit
def unpack_blocks_kernel(
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


@triton.jit
def add_norm_kernel(
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


@triton.jit
def rotate_kernel(
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


@triton.jit
def _segment(address, frames, step, KEPT: tl.constexpr, TAILS: tl.constexpr, dtype: tl.constexpr):
    """What a segment has of a step: TAILS numbers, and KEPT of each frame."""
    place = address.to(tl.pointer_type(dtype)) + step * (TAILS + frames.to(tl.int64) * KEPT)
    return tl.multiple_of(place, 16)


@triton.jit
def _scores(
    q, keys, first, limit, stop, stride: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr
):
    """Of KEYS keys from `first` on; unless MASKED, all of them are there, and every row sees them."""
    at = first + tl.arange(0, KEYS)
    place = keys + at[None, :] * stride + tl.arange(0, D)[:, None]
    if MASKED:
        k = tl.load(place, mask=(at < stop)[None, :], other=0.0)
        return tl.where(at[None, :] < limit[:, None], tl.dot(q, k), float("-inf"))
    else:
        return tl.dot(q, tl.load(place))


@triton.jit
def _weighed(p, values, acc, first, stop, stride: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr):
    """acc plus the values of keys from `first` on, by their weights."""
    at = first + tl.arange(0, p.shape[1])
    place = values + at[:, None] * stride + tl.arange(0, D)[None, :]
    if MASKED:
        v = tl.load(place, mask=(at < stop)[:, None], other=0.0)
    else:
        v = tl.load(place)
    return tl.dot(p.to(v.dtype), v, acc)


@triton.jit
def _attend_keys(
    q, keys, values, state, shift, limit, begin, stop, stride: tl.constexpr, scale,
    MASKED: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Keys `begin` to `stop`, of whose scores `shift` is taken; unless MASKED, whole groups of KEYS all rows see."""
    acc, total = state
    for first in tl.range(begin, stop, KEYS, num_stages=1 if MASKED else 3):
        p = tl.exp2(_scores(q, keys, first, limit, stop, stride, MASKED, D, KEYS) * scale - shift[:, None])
        total += tl.sum(tl.reshape(p, [p.shape[0], KEYS // OWN, OWN]), 1)
        acc = _weighed(p, values, acc, first, stop, stride, MASKED, D)
    return acc, total


@triton.jit
def _attend_any(
    q, keys, values, state, limit, begin, stop, stride: tl.constexpr, scale, D: tl.constexpr, KEYS: tl.constexpr
):
    """The same of any scores, by a running maximum (arXiv 1805.02867)."""
    acc, most, total = state
    for first in tl.range(begin, stop, KEYS, num_stages=1):
        score = _scores(q, keys, first, limit, stop, stride, True, D, KEYS)
        highest = tl.maximum(most, tl.max(score, 1) * scale)
        p = tl.exp2(score * scale - highest[:, None])
        fade = tl.exp2(most - highest)
        total = total * fade + tl.sum(p, 1)
        acc = _weighed(p, values, acc * fade[:, None], first, stop, stride, True, D)
        most = highest
    return acc, most, total


@triton.jit(do_not_specialize=["layer"])
def attend_kernel(
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
        segments, count = tl.load(past + 2).to(tl.pointer_type(tl.int64)), tl.load(past + 1).to(tl.int32)
        # The highest of the first keys' scores is taken of all: softmax is the same, if no weight is too large then.
        score = _scores(q, keys, start, limit, stop, stride, True, D, KEYS) * scale
        shift = tl.max(score, 1)
        p = tl.exp2(score - shift[:, None])
        acc = _weighed(p, values, tl.zeros([TILE, D], tl.float32), start, stop, stride, True, D)
        state = (acc, tl.sum(tl.reshape(p, [TILE, KEYS // OWN, OWN]), 1))
        for index in range(0, count):
            frames = tl.load(segments + 2 * index).to(tl.int32)
            k = _segment(tl.load(segments + 2 * index + 1), frames, step, KEPT, TAILS, qkv.dtype.element_ty)
            k += TAILS + mine * frames + head * D
            v, all_of_it, groups = k + HEADS * D, tl.zeros([TILE], tl.int32) + frames, frames // KEYS * KEYS
            state = _attend_keys(q, k, v, state, shift, all_of_it, 0, groups, wide, scale, False, D, KEYS)
            state = _attend_keys(q, k, v, state, shift, all_of_it, groups, frames, wide, scale, True, D, KEYS)
        second = start + KEYS
        state = _attend_keys(q, keys, values, state, shift, limit, second, whole, stride, scale, False, D, KEYS)
        rest = tl.maximum(second, whole)
        state = _attend_keys(q, keys, values, state, shift, limit, rest, stop, stride, scale, True, D, KEYS)
        acc, parts = state
        total = tl.sum(parts, 1)
        if tl.max(total) > FAR:
            lowest = tl.full([TILE], float("-inf"), tl.float32)
            anew = (tl.zeros([TILE, D], tl.float32), lowest, tl.zeros([TILE], tl.float32))
            for index in range(0, count):
                frames = tl.load(segments + 2 * index).to(tl.int32)
                k = _segment(tl.load(segments + 2 * index + 1), frames, step, KEPT, TAILS, qkv.dtype.element_ty)
                k += TAILS + mine * frames + head * D
                all_of_it = tl.zeros([TILE], tl.int32) + frames
                anew = _attend_any(q, k, k + HEADS * D, anew, all_of_it, 0, frames, wide, scale, D, FEW)
            acc, _, total = _attend_any(q, keys, values, anew, limit, start, stop, stride, scale, D, FEW)
        target = out + (branch + rows[:, None]) * (HEADS * D) + head * D + channel[None, :]
        tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=live)


@triton.jit
def _mish(x):
    """x tanh(log(1 + e^x))."""
    e = tl.exp(tl.minimum(x, 20.0))  # from there on it is x
    n = e * (e + 2)
    return x * n / (n + 2)


@triton.jit
def conv_mish_kernel(
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


@triton.jit
def enter_kernel(
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


@triton.jit
def begin_step_kernel(now, table, row, width, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(row + at, tl.load(table + tl.load(now) * width + at, mask=at < width), mask=at < width)


@triton.jit
def guide_kernel(
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
