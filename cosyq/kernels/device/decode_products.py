"""A tile of packed weights times one row of inputs, which are read, normed or joined on the way.

Codes of 8 and 4 bits are not decoded but multiplied as integers, by inputs as two signed bytes: 15 bits and a sign, of
the largest input. Floats are decoded and multiplied, and so are rows that cannot be read in words.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cosyq.kernels.device.packed import LEVELS, columns, decode, fetch, fetch_words, product


@triton.jit
def fetched(w, rows, valid, W: tl.constexpr):
    """Rows of weights as they are stored: codes and scales of their first columns, and of the rest."""
    w_ptr, scale_ptr, _, group_ptr, code_ptr = w
    if W.dot == "":
        first = fetch(w_ptr, scale_ptr, group_ptr, code_ptr, rows, valid, 0, W.first, W.k, W.kind, W.block)
        rest = first
        if W.rest > 0:
            rest = fetch(w_ptr, scale_ptr, group_ptr, code_ptr, rows, valid, W.first, W.rest, W.k, W.kind, W.block)
        return first, rest
    else:
        first = fetch_words(w_ptr, scale_ptr, group_ptr, code_ptr, rows, valid, 0, W.first, W.k, W.kind, W.block)
        rest = first
        if W.rest > 0:
            rest = fetch_words(w_ptr, scale_ptr, group_ptr, code_ptr, rows, valid, W.first, W.rest, W.k, W.kind,
                               W.block)  # fmt: skip
        return first, rest


@triton.jit
def _attended(k, inside, part_ptr, stat_ptr, count, pages_a_row: tl.constexpr, DIM: tl.constexpr):
    """Channels k of what the heads attended to: the parts of its pages as one softmax."""
    first, d = (k // DIM) * pages_a_row, k % DIM
    largest = tl.full(k.shape, -1e30, tl.float32)
    total = tl.zeros(k.shape, tl.float32)
    out = tl.zeros(k.shape, tl.float32)
    number = 0
    while number < count:
        for _ in tl.static_range(4):  # whose loads are under way together
            there = inside & (number < count)
            part = first + number
            score = tl.load(stat_ptr + part * 2, mask=there, other=-1e30)
            weight = tl.load(stat_ptr + part * 2 + 1, mask=there, other=0.0)
            value = tl.load(part_ptr + part * DIM + d, mask=there, other=0.0)
            both = tl.maximum(largest, score)
            mine, its = tl.exp(largest - both), tl.exp(score - both)
            out = out * mine + value * its
            total = total * mine + weight * its
            largest = both
            number += 1
    return out / tl.where(inside, total, 1.0)


@triton.jit
def _read(source, k, inside, H: tl.constexpr):
    """Inputs k: (x, gain) or (x,), or what the heads attended to: (parts, stats, pages)."""
    if len(source) == 1:
        return tl.load(source[0] + k, mask=inside, other=0.0)
    elif len(source) == 2:
        return tl.load(source[0] + k, mask=inside, other=0.0) * tl.load(source[1] + k, mask=inside, other=0.0)
    else:
        return _attended(k, inside, source[0], source[1], source[2], H.pages_a_row, H.dim)


@triton.jit
def _columns_of(source, k0: tl.constexpr, WIDTH: tl.constexpr, W: tl.constexpr, H: tl.constexpr):
    k, next_k = columns(k0, WIDTH, W.kind, W.block)
    even = _read(source, k, k < W.k, H)
    odd = even
    if (W.kind == 1) or (W.kind == 2):
        odd = _read(source, next_k, next_k < W.k, H)
    return even, odd


@triton.jit
def _fours_of(source, k0: tl.constexpr, WIDTH: tl.constexpr, W: tl.constexpr, H: tl.constexpr):
    """Inputs in groups of four, of 4 bits with neighbours swapped."""
    swap: tl.constexpr = 0 if W.kind == 0 else 1
    k = k0 + 4 * tl.arange(0, WIDTH // 4)
    inside = k < W.k
    return (_read(source, k + swap, inside, H), _read(source, k + (1 - swap), inside, H),
            _read(source, k + 2 + swap, inside, H), _read(source, k + 3 - swap, inside, H))  # fmt: skip


@triton.jit
def _largest(fours):
    """The largest magnitude, by the bits of a float, which are ordered as it is; what is not finite comes last."""
    largest = fours[0].to(tl.int32, bitcast=True) & 0x7FFFFFFF
    for j in tl.static_range(1, 4):
        largest = tl.maximum(largest, fours[j].to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return tl.max(largest, 0).to(tl.float32, bitcast=True)


@triton.jit
def _bytes(fours, inverse, W: tl.constexpr):
    """Words of the high and of the low bytes of four inputs."""
    high = tl.zeros(fours[0].shape, tl.int32)
    low = tl.zeros(fours[0].shape, tl.int32)
    for j in tl.static_range(4):
        level = tl.floor(fours[j] * inverse + 0.5).to(tl.int32)
        byte = (level + 128) >> 8
        high |= (byte & 255) << (8 * j)
        low |= ((level - byte * 256) & 255) << (8 * j)
    if W.kind == 0:
        return high, low
    else:
        words: tl.constexpr = W.block // 8
        blocks: tl.constexpr = high.shape[0] // (2 * words)
        h0, h1 = tl.split(tl.reshape(high, (blocks, words, 2)))
        l0, l1 = tl.split(tl.reshape(low, (blocks, words, 2)))
        return h0, h1, l0, l1


@triton.jit
def inputs_of(source, W: tl.constexpr, H: tl.constexpr = None):
    """Inputs [k] as `times` takes them."""
    if W.dot == "":
        first = _columns_of(source, 0, W.first, W, H)
        rest = first
        if W.rest > 0:
            rest = _columns_of(source, W.first, W.rest, W, H)
        return first, rest, 1.0
    else:
        if W.rest == W.first:
            fours = _fours_of(source, 0, 2 * W.first, W, H)
            largest = _largest(fours)
            high, low = _bytes(fours, LEVELS / tl.maximum(largest, 1e-30), W)
            words: tl.constexpr = W.first // 4
            first_high, rest_high = tl.split(tl.trans(tl.reshape(high, (2, words))))
            first_low, rest_low = tl.split(tl.trans(tl.reshape(low, (2, words))))
            return (first_high, first_low), (rest_high, rest_low), largest / LEVELS
        else:
            first = _fours_of(source, 0, W.first, W, H)
            rest = first
            largest = _largest(first)
            if W.rest > 0:
                rest = _fours_of(source, W.first, W.rest, W, H)
                largest = tl.maximum(largest, _largest(rest))
            inverse = LEVELS / tl.maximum(largest, 1e-30)
            return _bytes(first, inverse, W), _bytes(rest, inverse, W), largest / LEVELS


@triton.jit
def _dots(words, inputs, W: tl.constexpr):
    dot: tl.constexpr = W.dot
    if W.kind == 0:
        high, low = inputs
        return tl.inline_asm_elementwise(
            dot, "=r,=r,r,r,r", [words, high[None, :], low[None, :]], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        h0, h1, l0, l1 = inputs
        return tl.inline_asm_elementwise(
            dot, "=r,=r,r,r,r,r,r", [words, h0[None, :, :], h1[None, :, :], l0[None, :, :], l1[None, :, :]],
            dtype=(tl.int32, tl.int32), is_pure=True, pack=1)  # fmt: skip


@triton.jit
def _summed(high, low, scales, W: tl.constexpr):
    if W.kind == 0:
        return (tl.sum(high, 1).to(tl.float32) * 256 + tl.sum(low, 1).to(tl.float32)) * scales
    else:
        blocks = tl.sum(high, 2).to(tl.float32) * 256 + tl.sum(low, 2).to(tl.float32)
        return tl.sum(blocks * scales, 1) * (256 / LEVELS)


@triton.jit
def times(tile, inputs, table_ptr, W: tl.constexpr):
    """A tile of weights times inputs: [rows] float32."""
    lookup: tl.constexpr = W.lookup
    codes, scales = tile[0]
    if W.dot == "":
        even, odd = inputs[0]
        high, low = decode(codes, table_ptr, W.kind, lookup)
        out = product(high, low, scales, even, odd, W.kind)
        if W.rest > 0:
            more_codes, more_scales = tile[1]
            more_even, more_odd = inputs[1]
            more_high, more_low = decode(more_codes, table_ptr, W.kind, lookup)
            out += product(more_high, more_low, more_scales, more_even, more_odd, W.kind)
        return out
    else:
        high, low = _dots(codes, inputs[0], W)
        if W.rest == 0:
            return _summed(high, low, scales, W) * inputs[2]
        else:
            more_codes, more_scales = tile[1]
            more_high, more_low = _dots(more_codes, inputs[1], W)
            if (W.rest == W.first) and (W.kind == 0):
                return _summed(high + more_high, low + more_low, scales, W) * inputs[2]
            else:
                return (_summed(high, low, scales, W) + _summed(more_high, more_low, more_scales, W)) * inputs[2]
