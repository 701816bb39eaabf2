"""A tile of packed weights times one row of inputs, which are read, normed or joined on the way.

Codes of 8 and 4 bits are not decoded to floats but multiplied as integers, by inputs as two signed bytes: 15 bits and a
sign, of the largest input. Floats are decoded and multiplied, and so are rows that cannot be read in words.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cosyq.kernels import packed
from cosyq.kernels.device.packed import columns, decode, fetch, fetch_scales, fetch_words, product

LEVELS, STEPS = tl.constexpr(packed.LEVELS), tl.constexpr(packed.STEPS)
IN_BYTES, INT8_DOT = tl.constexpr(packed.IN_BYTES), tl.constexpr(packed.INT8_DOT)
FOUR_BIT_VALUES, FOUR_BIT_DOT = tl.constexpr(packed.FOUR_BIT_VALUES), tl.constexpr(packed.FOUR_BIT_DOT)
SUM_OF_BYTES, OWN = tl.constexpr(packed.SUM_OF_BYTES), tl.constexpr(packed.OWN)
POINT = tl.constexpr(1.5 * 2**23)  # a float this large has no bits behind its point


@triton.jit
def fetched(w, rows, valid, W: tl.constexpr):
    """Rows of weights as they are stored: codes and scales of their first columns, and of the rest."""
    w_ptr, scale_ptr, _, group_ptr, code_ptr, plane_ptr = w
    if not W.dot:
        first = fetch(w_ptr, scale_ptr, group_ptr, code_ptr, rows, valid, 0, W.first, W.k, W.kind, W.block)
        rest = first
        if W.rest > 0:
            rest = fetch(w_ptr, scale_ptr, group_ptr, code_ptr, rows, valid, W.first, W.rest, W.k, W.kind, W.block)
        return first, rest
    else:
        words = fetch_words(w_ptr, rows, valid, 0, W.first, W.k, W.kind)
        more = words
        if W.rest > 0:
            more = fetch_words(w_ptr, rows, valid, W.first, W.rest, W.k, W.kind)
        planes = _planes(plane_ptr, W)
        scales, more_scales = fetch_scales(scale_ptr, group_ptr, code_ptr, rows, valid, W.first, W.rest, W.k, W.kind,
                                           W.block)  # fmt: skip
        if W.early:
            return (_decoded(words, planes, W), scales), (_decoded(more, planes, W), more_scales)
        else:
            return ((words, planes), scales), ((more, planes), more_scales)


@triton.jit
def _plane(plane_ptr, i: tl.constexpr):
    return tl.inline_asm_elementwise(OWN, "=r,r,r", [tl.load(plane_ptr + i), tl.load(plane_ptr + 8)], dtype=tl.int32,
                                     is_pure=True, pack=1)  # fmt: skip


@triton.jit
def _planes(plane_ptr, W: tl.constexpr):
    if W.kind == 0:
        return (0,)
    else:
        return (_plane(plane_ptr, 0), _plane(plane_ptr, 1), _plane(plane_ptr, 2), _plane(plane_ptr, 3),
                _plane(plane_ptr, 4), _plane(plane_ptr, 5), _plane(plane_ptr, 6), _plane(plane_ptr, 7))  # fmt: skip


@triton.jit
def _decoded(words, planes, W: tl.constexpr):
    if W.kind == 0:
        return (words,)
    else:
        return tl.inline_asm_elementwise(
            FOUR_BIT_VALUES, "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [words, planes[0], planes[1], planes[2], planes[3], planes[4], planes[5], planes[6], planes[7]],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1)  # fmt: skip


@triton.jit
def _attended(head, d, inside, part_ptr, stat_ptr, count, pages_a_row: tl.constexpr, DIM: tl.constexpr):
    """Channels d [n, channels] of heads [n]: the parts of a head's pages as one softmax; 0 where not `inside` [n]."""
    largest = tl.full(head.shape, -1e30, tl.float32)
    total = tl.zeros(head.shape, tl.float32)
    out = tl.zeros(d.shape, tl.float32)
    first = tl.where(inside, head * pages_a_row, 0)
    number = 0
    while number < count:  # four pages whose loads are under way together
        score0, weight0, value0 = _part(first, d, number, part_ptr, stat_ptr, count, pages_a_row, DIM)
        score1, weight1, value1 = _part(first, d, number + 1, part_ptr, stat_ptr, count, pages_a_row, DIM)
        score2, weight2, value2 = _part(first, d, number + 2, part_ptr, stat_ptr, count, pages_a_row, DIM)
        score3, weight3, value3 = _part(first, d, number + 3, part_ptr, stat_ptr, count, pages_a_row, DIM)
        new = tl.maximum(tl.maximum(tl.maximum(score0, score1), tl.maximum(score2, score3)), largest)
        before = tl.exp(largest - new)
        times0, times1 = tl.exp(score0 - new), tl.exp(score1 - new)
        times2, times3 = tl.exp(score2 - new), tl.exp(score3 - new)
        total = total * before + weight0 * times0 + weight1 * times1 + weight2 * times2 + weight3 * times3
        out = out * before[:, None] + value0 * times0[:, None] + value1 * times1[:, None]
        out += value2 * times2[:, None] + value3 * times3[:, None]
        largest = new
        number += 4
    return tl.where(inside[:, None], out * (1 / total)[:, None], 0.0)


@triton.jit
def _part(first, d, number, part_ptr, stat_ptr, count, pages_a_row: tl.constexpr, DIM: tl.constexpr):
    """Largest score, sum of weights and part of the sum; of a page that is not in use nothing, for any numbers."""
    part = first + tl.minimum(number, pages_a_row - 1)
    score, weight = tl.load(stat_ptr + part * 2), tl.load(stat_ptr + part * 2 + 1)
    value = tl.load(part_ptr + (part * DIM)[:, None] + d)
    used = number < count
    return tl.where(used, score, -1e30), tl.where(used, weight, 0.0), tl.where(used, value, 0.0)


@triton.jit
def _places(k0: tl.constexpr, WIDTH: tl.constexpr, W: tl.constexpr):
    """Which inputs: in groups of four [n, 4] for `dot`, else twice as `decode` leaves two values."""
    if W.dot:
        k = k0 + 4 * tl.arange(0, WIDTH // 4)[:, None] + tl.arange(0, 4)[None, :]
        return k, k
    else:
        return columns(k0, WIDTH, W.kind, W.block)


@triton.jit
def _pair(ptr, places, W: tl.constexpr):
    """Numbers at both `places`, 0 beyond the last."""
    even = tl.load(ptr + places[0], mask=places[0] < W.k, other=0.0)
    odd = even
    if (not W.dot) and ((W.kind == 1) or (W.kind == 2)):
        odd = tl.load(ptr + places[1], mask=places[1] < W.k, other=0.0)
    return even, odd


@triton.jit
def read(ptr, W: tl.constexpr):
    """A number for every column, of the first ones and of the rest."""
    first = _pair(ptr, _places(0, W.wide, W), W)
    rest = first
    if W.more > 0:
        rest = _pair(ptr, _places(W.wide, W.more, W), W)
    return first, rest


@triton.jit
def read_attended(part_ptr, stat_ptr, count, W: tl.constexpr, H: tl.constexpr):
    """As `read`: what the heads attended to."""
    first = _attended_pair(0, W.wide, part_ptr, stat_ptr, count, W, H)
    rest = first
    if W.more > 0:
        rest = _attended_pair(W.wide, W.more, part_ptr, stat_ptr, count, W, H)
    return first, rest


@triton.jit
def _attended_pair(k0: tl.constexpr, WIDTH: tl.constexpr, part_ptr, stat_ptr, count, W: tl.constexpr,
                   H: tl.constexpr):  # fmt: skip
    if W.dot:  # four channels are of one head
        k = k0 + 4 * tl.arange(0, WIDTH // 4)
        out = _attended(k // H.dim, (k % H.dim)[:, None] + tl.arange(0, 4)[None, :], k < W.k, part_ptr, stat_ptr,
                        count, H.pages_a_row, H.dim)  # fmt: skip
        return out, out
    else:
        even, odd = columns(k0, WIDTH, W.kind, W.block)
        shape: tl.constexpr = even.shape
        even, odd = tl.reshape(even, (even.numel, 1)), tl.reshape(odd, (even.numel, 1))
        head = tl.reshape(even // H.dim, (even.numel,))
        inside = tl.reshape(even < W.k, (even.numel,))
        first = _attended(head, even % H.dim, inside, part_ptr, stat_ptr, count, H.pages_a_row, H.dim)
        second = first
        if (W.kind == 1) or (W.kind == 2):  # two neighbours are of one head
            second = _attended(head, odd % H.dim, inside, part_ptr, stat_ptr, count, H.pages_a_row, H.dim)
        return tl.reshape(first, shape), tl.reshape(second, shape)


@triton.jit
def _times_pair(x, y):
    return x[0] * y[0], x[1] * y[1]


@triton.jit
def _squares(x, W: tl.constexpr):
    squares = x[0] * x[0]
    if (not W.dot) and ((W.kind == 1) or (W.kind == 2)):
        squares += x[1] * x[1]
    return squares


@triton.jit
def _magnitude(x):
    """By the bits of a float, which are ordered as it is; what is not finite comes last."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)


@triton.jit
def _larger_and_sum(largest, total, its_largest, its_total):
    return tl.maximum(largest, its_largest), total + its_total


@triton.jit
def normed(x, gains, eps, W: tl.constexpr):
    """Inputs as `times` takes them, of x by the gains, and 1 / the root of the mean square of x."""
    first, rest = x
    scaled = _times_pair(first, gains[0]), _times_pair(rest, gains[1])
    if W.dot:
        largest, total = tl.reduce((_magnitude(scaled[0][0]), tl.sum(first[0] * first[0], 1)), 0, _larger_and_sum)
        if W.more > 0:
            its, its_total = tl.reduce((_magnitude(scaled[1][0]), tl.sum(rest[0] * rest[0], 1)), 0, _larger_and_sum)
            largest, total = _larger_and_sum(largest, total, its, its_total)
        return _row_of_bytes(scaled, largest, W), tl.rsqrt(total / W.k + eps)
    else:
        inputs = inputs_of(scaled, W)
        total = tl.sum(_squares(first, W))
        if W.more > 0:
            total += tl.sum(_squares(rest, W))
        return inputs, tl.rsqrt(total / W.k + eps)


@triton.jit
def inputs_of(x, W: tl.constexpr):
    """Inputs as `times` takes them, of what `read` read."""
    first, rest = x
    if not W.dot:
        return first, rest
    else:
        largest = tl.max(_magnitude(first[0]), 0)
        if W.more > 0:
            largest = tl.maximum(largest, tl.max(_magnitude(rest[0]), 0))
        return _row_of_bytes(x, largest, W)


@triton.jit
def _bytes(x, inverse, SWAPPED: tl.constexpr):
    """Words of the high and of the low bytes of four inputs x [n, 4], whose neighbours may be swapped."""
    levels = (x * inverse + POINT).to(tl.int32, bitcast=True)
    even, odd = tl.split(tl.reshape(levels, (levels.shape[0], 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    if SWAPPED:
        given = (x1, x0, x3, x2)
    else:
        given = (x0, x1, x2, x3)
    return tl.inline_asm_elementwise(IN_BYTES, "=&r,=&r,r,r,r,r", [given[0], given[1], given[2], given[3]],
                                     dtype=(tl.int32, tl.int32), is_pure=True, pack=1)  # fmt: skip


@triton.jit
def _inverse(largest):
    """How many steps there are to 1, and how large one is, if this is the largest, by its bits."""
    step = largest.to(tl.float32, bitcast=True) / LEVELS
    return 1 / tl.maximum(step, 1e-30), step


@triton.jit
def _row_of_bytes(x, largest, W: tl.constexpr):
    """Words of inputs in steps of the largest of all."""
    inverse, step = _inverse(largest)
    if W.kind == 0:
        low, high = _bytes(x[0][0], inverse, False)
        more_low, more_high = low, high
        if W.more > 0:
            more_low, more_high = _bytes(x[1][0], inverse, False)
        elif W.rest > 0:
            words: tl.constexpr = W.first // 4
            high, more_high = tl.split(tl.trans(tl.reshape(high, (2, words))))
            low, more_low = tl.split(tl.trans(tl.reshape(low, (2, words))))
        return (high, low, step), (more_high, more_low, step)
    else:
        first, second = _neighbours(x[0][0], inverse)
        more_first, more_second = first, second
        if W.more > 0:
            more_first, more_second = _neighbours(x[1][0], inverse)
        return (first, second, step), (more_first, more_second, step)


@triton.jit
def _neighbours(x, inverse):
    low, high = _bytes(x, inverse, True)
    both = high.to(tl.int64) << 32 | low.to(tl.uint32, bitcast=True).to(tl.int64)  # they change threads together
    return tl.split(tl.reshape(both, (both.shape[0] // 2, 2)))


@triton.jit
def _rows_dot(words, inputs, W: tl.constexpr):
    """int8: sums of a row's words, by the inputs' high and low bytes."""
    return tl.inline_asm_elementwise(
        INT8_DOT, "=r,=r,r,r,r", [words, inputs[0][None, :], inputs[1][None, :]], dtype=(tl.int32, tl.int32),
        is_pure=True, pack=1)  # fmt: skip


@triton.jit
def _blocks_dot(tile, inputs, W: tl.constexpr):
    """4 bits: rows' sums [r] of blocks times their scales."""
    codes, scales = tile
    if W.early:
        planes = codes
    else:
        planes = _decoded(codes[0], codes[1], W)
    first, second = inputs[0][None, :], inputs[1][None, :]
    h0, l0 = (first >> 32).to(tl.int32), first.to(tl.int32)
    h1, l1 = (second >> 32).to(tl.int32), second.to(tl.int32)
    sums = tl.inline_asm_elementwise(
        FOUR_BIT_DOT, "=r,r,r,r,r,r,r,r,r", [planes[0], planes[1], planes[2], planes[3], h0, h1, l0, l1],
        dtype=tl.int32, is_pure=True, pack=1)  # fmt: skip
    high, low = tl.inline_asm_elementwise(
        SUM_OF_BYTES, "=&r,=&r,r,r,r,r", [h0, h1, l0, l1], dtype=(tl.int32, tl.int32), is_pure=True,
        pack=1)  # fmt: skip
    # a value is (its level - STEPS / 2), and what two low bytes leave is as if all those of weights were 63.5
    ones = _of_threads(high, W).to(tl.float32) * STEPS + _of_threads(low, W).to(tl.float32) * ((STEPS - 127) / 256)
    return tl.sum(_flat((_of_threads(sums, W).to(tl.float32) - ones) * scales[:, :, None]), 1) * inputs[2]


@triton.jit
def _of_threads(words, W: tl.constexpr):
    """Words [r, words] summed as far as they are in one thread: [r, blocks, words of a block / 4]."""
    fours: tl.constexpr = W.block // 32
    return tl.sum(tl.reshape(words, (words.shape[0], words.shape[1] // (4 * fours), fours, 4)), 3)


@triton.jit
def _flat(x):
    return tl.reshape(x, (x.shape[0], x.shape[1] * x.shape[2]))


@triton.jit
def times(tile, inputs, table_ptr, W: tl.constexpr):
    """A tile of weights times inputs: [rows] float32."""
    first, rest = inputs
    if not W.dot:
        lookup: tl.constexpr = W.lookup
        codes, scales = tile[0]
        high, low = decode(codes, table_ptr, W.kind, lookup)
        out = product(high, low, scales, first[0], first[1], W.kind)
        if W.rest > 0:
            more_codes, more_scales = tile[1]
            more_high, more_low = decode(more_codes, table_ptr, W.kind, lookup)
            out += product(more_high, more_low, more_scales, rest[0], rest[1], W.kind)
        return out
    elif W.kind == 0:
        high, low = _rows_dot(tile[0][0][0], first, W)
        if W.rest > 0:
            more_high, more_low = _rows_dot(tile[1][0][0], rest, W)
            if W.rest == W.first:
                high += more_high
                low += more_low
            else:
                return _whole(high, low, more_high, more_low) * tile[0][1] * first[2]
        return (tl.sum(high, 1).to(tl.float32) * 256 + tl.sum(low, 1).to(tl.float32)) * tile[0][1] * first[2]
    else:
        out = _blocks_dot(tile[0], first, W)
        if W.rest > 0:
            out += _blocks_dot(tile[1], rest, W)
        return out * (256 / STEPS)


@triton.jit
def _whole(high, low, more_high, more_low):
    return ((tl.sum(high, 1).to(tl.float32) + tl.sum(more_high, 1).to(tl.float32)) * 256
            + tl.sum(low, 1).to(tl.float32) + tl.sum(more_low, 1).to(tl.float32))  # fmt: skip
