"""Products of several rows with packed weights, on tensor cores, with what a layer does before and after them.

Each reads every weight that it needs once for a tile of rows. A product that ends a part of a layer adds to x, and
leaves for the next one what a norm needs: x times its gain, in the products' type, and its tile's sum of squares, from
which the next one makes the factor of a row. So no norm is a kernel, and none reads all of x.

With programmatic dependent launch the next kernel may start behind `wait`, or, where tiles are large and not `EARLY`,
behind the product. Were it let in sooner, kernels that only wait would take the chip's room from those that run, and
from other streams.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cosyq.kernels.device.overlap import let_next_start, wait
from cosyq.kernels.device.packed import INT8_STEP, NESTED_BLOCKS, decode

GAINED = tl.constexpr(1 / 64)  # x times a gain is kept so much smaller, which a float16 needs


@triton.jit
def _absmax(scale_ptr, n, k0, BK: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Of rows n and the blocks from column k0 on: what the artifact holds of their scales."""
    blocks: tl.constexpr = BK // BLOCK if BK > BLOCK else 1
    block = tl.minimum(k0 // BLOCK + tl.arange(0, blocks), K // BLOCK - 1)
    index = n.to(tl.int64)[:, None] * (K // BLOCK) + block[None, :]
    return tl.load(scale_ptr + index), index // NESTED_BLOCKS


@triton.jit
def _scales(absmax, group, group_ptr, code_ptr, KIND: tl.constexpr):
    if KIND == 2:
        return tl.load(code_ptr + absmax.to(tl.int32)) * tl.load(group_ptr + group * 2) + tl.load(
            group_ptr + group * 2 + 1
        )
    else:
        return absmax


@triton.jit
def _accumulate(x_ptr, at, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, n, first, SPAN: tl.constexpr,
                K: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, LOOKUP: tl.constexpr, DOT: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Rows `at` of x [m, K] times rows n of the weights over columns first .. first + SPAN: [BM, BN] float32."""
    total = tl.zeros((BM, BN), tl.float32)
    if (KIND == 0) or (KIND == 3):
        for k0 in range(0, SPAN, BK):
            k = first + k0 + tl.arange(0, BK)
            xs, ws = x_ptr + at[:, None] * K + k[None, :], w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
            if K % SPAN == 0:
                x, w = tl.load(xs), tl.load(ws)
            else:
                x, w = tl.load(xs, mask=(k < K)[None, :], other=0.0), tl.load(ws, mask=(k < K)[None, :], other=0)
            total = tl.dot(x, tl.trans(w.to(DOT)), total, input_precision="ieee")
    else:
        blocks: tl.constexpr = BK // BLOCK if BK > BLOCK else 1
        # Scales are fetched two turns ahead: the second of their loads waits for the first.
        absmax, group = _absmax(scale_ptr, n, first, BK, K, BLOCK)
        scales = _scales(absmax, group, group_ptr, code_ptr, KIND)
        absmax, group = _absmax(scale_ptr, n, first + BK, BK, K, BLOCK)
        for k0 in range(0, SPAN, BK):
            k, byte = first + k0 + tl.arange(0, BK), (first + k0) // 2 + tl.arange(0, BK // 2)
            xs = x_ptr + at[:, None] * K + k[None, :]
            ws = w_ptr + n.to(tl.int64)[:, None] * (K // 2) + byte[None, :]
            if K % SPAN == 0:
                x, codes = tl.load(xs), tl.load(ws)
            else:
                x = tl.load(xs, mask=(k < K)[None, :], other=0.0)
                codes = tl.load(ws, mask=(byte < K // 2)[None, :], other=0)
            here = tl.reshape(tl.broadcast_to(scales[:, :, None], (BN, blocks, BK // 2 // blocks)), (BN, BK // 2))
            scales = _scales(absmax, group, group_ptr, code_ptr, KIND)
            absmax, group = _absmax(scale_ptr, n, first + k0 + 2 * BK, BK, K, BLOCK)
            high, low = decode(codes, table_ptr, KIND, LOOKUP)
            w = tl.reshape(tl.join((high * here).to(DOT), (low * here).to(DOT)), (BN, BK))
            total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    return total


@triton.jit
def _weights(w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, n, first, K: tl.constexpr, KIND: tl.constexpr,
             BLOCK: tl.constexpr, LOOKUP: tl.constexpr, DOT: tl.constexpr, WAYS: tl.constexpr, BN: tl.constexpr,
             BK: tl.constexpr):  # fmt: skip
    """Columns first .. first + BK of the rows n, in as many parts as there are warps: [WAYS, BN, BK / WAYS].

    Those of int8 lack their rows' scales.
    """
    width: tl.constexpr = BK // WAYS
    begin, row = first + tl.arange(0, WAYS)[:, None, None] * width, n.to(tl.int64)[None, :, None]
    if (KIND == 0) or (KIND == 3):
        k = begin + tl.arange(0, width)[None, None, :]
        return tl.load(w_ptr + row * K + k, mask=k < K, other=0).to(DOT)
    else:
        blocks: tl.constexpr = width // BLOCK if width > BLOCK else 1
        byte = begin // 2 + tl.arange(0, width // 2)[None, None, :]
        codes = tl.load(w_ptr + row * (K // 2) + byte, mask=byte < K // 2, other=0)
        block = tl.minimum(begin // BLOCK + tl.arange(0, blocks)[None, None, :], K // BLOCK - 1)
        index = row * (K // BLOCK) + block
        scales = _scales(tl.load(scale_ptr + index), index // NESTED_BLOCKS, group_ptr, code_ptr, KIND)
        scales = tl.broadcast_to(scales[:, :, :, None], (WAYS, BN, blocks, width // 2 // blocks))
        scales = tl.reshape(scales, (WAYS, BN, width // 2))
        high, low = decode(codes, table_ptr, KIND, LOOKUP)
        return tl.reshape(tl.join((high * scales).to(DOT), (low * scales).to(DOT)), (WAYS, BN, width))


@triton.jit
def _columns(x_ptr, at, first, K: tl.constexpr, WAYS: tl.constexpr, BK: tl.constexpr):
    """Of rows `at` of x what `_weights` are multiplied by: [WAYS, BM, BK / WAYS]."""
    width: tl.constexpr = BK // WAYS
    k = first + tl.arange(0, WAYS)[:, None, None] * width + tl.arange(0, width)[None, None, :]
    return tl.load(x_ptr + at[None, :, None] * K + k, mask=k < K, other=0.0)


@triton.jit
def _times(x, w):
    """`_columns` times `_weights`: [BM, BN] float32. Each warp sums a part of the columns."""
    return tl.sum(tl.dot(x, tl.permute(w, (0, 2, 1)), input_precision="ieee"), 0)


@triton.jit
def _squares(square_ptr, at, TILES: tl.constexpr, PADDED: tl.constexpr):
    """Of rows `at` of x, every tile's sum of squares."""
    tile = tl.arange(0, PADDED)
    return tl.load(square_ptr + at[:, None] * TILES + tile[None, :], mask=(tile < TILES)[None, :], other=0.0)


@triton.jit
def _factor(squares, eps, K: tl.constexpr):
    """1 / the root of the mean square of each row, for what was kept in `GAINED` size."""
    return tl.rsqrt(tl.sum(squares, 1) / K + eps) / GAINED


@triton.jit
def _row_scales(scale_ptr, n, KIND: tl.constexpr):
    if KIND == 0:
        return tl.load(scale_ptr + n) * INT8_STEP
    else:
        return tl.full(n.shape, 1.0, tl.float32)


@triton.jit
def _halves(total, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(total, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def gather_kernel(source_ptr, which_ptr, out_ptr, N: tl.constexpr, PADDED: tl.constexpr):
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    x = tl.load(source_ptr + tl.load(which_ptr + row).to(tl.int64) * N + k, mask=k < N)
    tl.store(out_ptr + row * N + k, x, mask=k < N)


@triton.jit
def begin_kernel(x_ptr, gain_ptr, gained_ptr, square_ptr, K: tl.constexpr, PADDED: tl.constexpr, TILES: tl.constexpr,
                 TILES_PADDED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    row, k, tile = tl.program_id(0), tl.arange(0, PADDED), tl.arange(0, TILES_PADDED)
    gain = tl.load(gain_ptr + k, mask=k < K, other=0.0)
    wait(PDL)
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0)
    let_next_start(PDL)
    tl.store(gained_ptr + row * K + k, (x * gain * GAINED).to(gained_ptr.dtype.element_ty), mask=k < K)
    tl.store(square_ptr + row * TILES + tile, tl.where(tile == 0, tl.sum(x * x, 0), 0.0), mask=tile < TILES)


@triton.jit(do_not_specialize=["M"])
def turned_kernel(x_ptr, square_ptr, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, bias_ptr, cos_ptr, sin_ptr,
                  position_ptr, owner_ptr, page_ptr, q_ptr, key_ptr, value_ptr, M, eps, page_stride: tl.constexpr,
                  HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
                  TILES: tl.constexpr, TILES_PADDED: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr,
                  KIND: tl.constexpr, BLOCK: tl.constexpr, LOOKUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  BK: tl.constexpr, WAYS: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Queries, keys and values of the normed x; the first two rotated, the last two stored in their row's page."""
    dot: tl.constexpr = x_ptr.dtype.element_ty
    half: tl.constexpr = DIM // 2
    pairs: tl.constexpr = BN // 2
    head = tl.program_id(0) // (half // pairs)
    pair = tl.program_id(0) % (half // pairs) * pairs + tl.arange(0, pairs)
    upper, lower = head * DIM + pair, head * DIM + half + pair  # the rows that turn together
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    inside, at = m < M, tl.minimum(m, M - 1)
    if WAYS > 1:
        w1 = _weights(w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, upper, 0, K, KIND, BLOCK, LOOKUP, dot, WAYS,
                      BN // 2, BK)  # fmt: skip
        w2 = _weights(w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, lower, 0, K, KIND, BLOCK, LOOKUP, dot, WAYS,
                      BN // 2, BK)  # fmt: skip
    else:
        column = tl.arange(0, BN)
        n = head * DIM + column // pairs * half + tl.program_id(0) % (half // pairs) * pairs + column % pairs
    scale1, scale2 = _row_scales(scale_ptr, upper, KIND), _row_scales(scale_ptr, lower, KIND)
    bias1, bias2, owner = tl.load(bias_ptr + upper), tl.load(bias_ptr + lower), tl.load(owner_ptr + at)
    place = tl.load(position_ptr + at, cache_modifier=".cg")
    position = tl.maximum(place, 0)
    page = tl.load(page_ptr + owner * page_stride + position // PAGE, mask=place >= 0, other=0).to(tl.int64)
    angle = position[:, None] * half + pair[None, :]
    cos, sin = tl.load(cos_ptr + angle), tl.load(sin_ptr + angle)
    wait(PDL)
    let_next_start(PDL and EARLY)
    if WAYS > 1:
        x = _columns(x_ptr, at, 0, K, WAYS, BK)
    factor = _factor(_squares(square_ptr, at, TILES, TILES_PADDED), eps, K)
    if WAYS > 1:
        one, two = _times(x, w1), _times(x, w2)
    else:
        one, two = _halves(_accumulate(x_ptr, at, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, n, 0, SPAN, K,
                                       KIND, BLOCK, LOOKUP, dot, BM, BN, BK), BM, BN)  # fmt: skip
    let_next_start(PDL and not EARLY)
    one = one * factor[:, None] * scale1[None, :] + bias1[None, :]
    two = two * factor[:, None] * scale2[None, :] + bias2[None, :]
    if head < HEADS + KV_HEADS:
        turned = one * cos - two * sin
        two = two * cos + one * sin
        one = turned
    if head < HEADS:
        q = q_ptr + (m[:, None] * HEADS + head) * DIM + pair[None, :]
        tl.store(q, one.to(q_ptr.dtype.element_ty), mask=inside[:, None])
        tl.store(q + half, two.to(q_ptr.dtype.element_ty), mask=inside[:, None])
    else:
        cache = key_ptr if head < HEADS + KV_HEADS else value_ptr
        to = ((page * KV_HEADS + (head - HEADS) % KV_HEADS) * PAGE + position % PAGE)[:, None] * DIM + pair[None, :]
        tl.store(cache + to, one.to(key_ptr.dtype.element_ty), mask=inside[:, None])
        tl.store(cache + to + half, two.to(key_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["M"])
def gated_kernel(x_ptr, square_ptr, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, out_ptr, M, eps, N: tl.constexpr,
                 TILES: tl.constexpr, TILES_PADDED: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr,
                 KIND: tl.constexpr, BLOCK: tl.constexpr, LOOKUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 BK: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """silu(gate) * up of the normed x, [M, N]; the weight's first N rows are the gate's."""
    dot: tl.constexpr = x_ptr.dtype.element_ty
    pairs: tl.constexpr = BN // 2
    out = tl.program_id(0) * pairs + tl.arange(0, pairs)
    n = tl.minimum(out, N - 1)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    at = tl.minimum(m, M - 1)
    column = tl.arange(0, BN)
    both = tl.minimum(tl.program_id(0) * pairs + column % pairs, N - 1) + column // pairs * N
    scale1, scale2 = _row_scales(scale_ptr, n, KIND), _row_scales(scale_ptr, N + n, KIND)
    wait(PDL)
    let_next_start(PDL and EARLY)
    factor = _factor(_squares(square_ptr, at, TILES, TILES_PADDED), eps, K)
    gate, up = _halves(_accumulate(x_ptr, at, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, both, 0, SPAN, K,
                                   KIND, BLOCK, LOOKUP, dot, BM, BN, BK), BM, BN)  # fmt: skip
    let_next_start(PDL and not EARLY)
    gate *= factor[:, None] * scale1[None, :]
    up *= factor[:, None] * scale2[None, :]
    result = gate / (1 + tl.exp(-gate)) * up
    tl.store(
        out_ptr + m[:, None] * N + out[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=(m < M)[:, None] & (out < N)[None, :],
    )


@triton.jit
def _leave(x, gain, m, n, M, x_ptr, gained_ptr, square_ptr, N: tl.constexpr, TILES: tl.constexpr):
    """Store x, and what the next norm needs."""
    both = (m < M)[:, None] & (n < N)[None, :]
    to = m[:, None] * N + n[None, :]
    tl.store(x_ptr + to, x, mask=both)
    tl.store(gained_ptr + to, (x * gain[None, :] * GAINED).to(gained_ptr.dtype.element_ty), mask=both)
    x = tl.where(both, x, 0.0)
    tl.store(square_ptr + m * TILES + tl.program_id(0), tl.sum(x * x, 1), mask=m < M)


@triton.jit(do_not_specialize=["M"])
def added_kernel(y_ptr, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, x_ptr, gain_ptr, gained_ptr, square_ptr,
                 part_ptr, count_ptr, M, N: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr,
                 K: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, LOOKUP: tl.constexpr, BM: tl.constexpr,
                 BN: tl.constexpr, BK: tl.constexpr, WAYS: tl.constexpr, EARLY: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """x [M, N] += y [M, K] times the weight, whose columns `SPLITS` programs share; the last to end adds up."""
    dot: tl.constexpr = y_ptr.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    first = tl.program_id(2) * SPAN
    at, row = tl.minimum(m, M - 1), tl.minimum(n, N - 1)
    if WAYS > 1:
        w = _weights(w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, row, first, K, KIND, BLOCK, LOOKUP, dot, WAYS,
                     BN, BK)  # fmt: skip
    row_scale = _row_scales(scale_ptr, row, KIND)
    gain = tl.load(gain_ptr + row)
    wait(PDL)
    let_next_start(PDL and EARLY)
    if WAYS > 1:
        y = _columns(y_ptr, at, first, K, WAYS, BK)
    x = tl.load(x_ptr + at[:, None] * N + row[None, :])
    if WAYS > 1:
        total = _times(y, w)
    else:
        total = _accumulate(y_ptr, at, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, row, first, SPAN, K, KIND,
                            BLOCK, LOOKUP, dot, BM, BN, BK)  # fmt: skip
    let_next_start(PDL and not EARLY)
    total *= row_scale[None, :]
    if SPLITS == 1:
        _leave(x + total, gain, m, n, M, x_ptr, gained_ptr, square_ptr, N, TILES)
    else:
        tile = tl.program_id(1) * TILES + tl.program_id(0)
        place = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        tl.store(part_ptr + (tile * SPLITS + tl.program_id(2)) * (BM * BN) + place, total)
        tl.debug_barrier()  # all of it is there before it is counted
        if tl.atomic_add(count_ptr + tile, 1) == SPLITS - 1:
            total = tl.zeros((BM, BN), tl.float32)
            for split in tl.static_range(SPLITS):  # in one order, whoever comes last
                total += tl.load(part_ptr + (tile * SPLITS + split) * (BM * BN) + place, cache_modifier=".cg")
            _leave(x + total, gain, m, n, M, x_ptr, gained_ptr, square_ptr, N, TILES)
            tl.store(count_ptr + tile, 0)


@triton.jit(do_not_specialize=["M"])
def head_kernel(x_ptr, square_ptr, which_ptr, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, out_ptr, M, eps,
                N: tl.constexpr, TILES: tl.constexpr, TILES_PADDED: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr,
                KIND: tl.constexpr, BLOCK: tl.constexpr, LOOKUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                BK: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The normed x of some rows times the weight, [M, N]."""
    dot: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    at, row = tl.load(which_ptr + tl.minimum(m, M - 1)), tl.minimum(n, N - 1)
    row_scale = _row_scales(scale_ptr, row, KIND)
    wait(PDL)
    let_next_start(PDL and EARLY)
    factor = _factor(_squares(square_ptr, at, TILES, TILES_PADDED), eps, K)
    total = _accumulate(x_ptr, at, w_ptr, scale_ptr, table_ptr, group_ptr, code_ptr, row, 0, SPAN, K, KIND, BLOCK,
                        LOOKUP, dot, BM, BN, BK)  # fmt: skip
    let_next_start(PDL and not EARLY)
    total *= row_scale[None, :] * factor[:, None]
    tl.store(out_ptr + m[:, None] * N + n[None, :], total, mask=(m < M)[:, None] & (n < N)[None, :])
