"""The vocoder's layers, see `cosyq.kernels.vocoder`."""

from __future__ import annotations

import triton
import triton.language as tl

from cosyq.kernels.device.streaming import FINAL, FIRST, FRAMES, emit


@triton.jit
def _sine_of_turns(t):
    """sin(pi t) for t in -0.5 .. 0.5."""
    u = t * t
    s = -0.007370430945714351 * u + 0.08214588661112823
    s = s * u - 0.5992645293207921
    s = s * u + 2.550164039877345
    s = s * u - 5.16771278004997
    return t * (s * u + 3.141592653589793)


@triton.jit
def _sine(x):
    """sin(x) to 1e-7 of x: for the thousands and millions the library's is exact, at ten times the cost."""
    t = x * 0.3183098861837907
    k = tl.floor(t + 0.5)
    s = _sine_of_turns(t - k)
    return tl.where(k == 2 * tl.floor(k * 0.5), s, -s)


@triton.jit
def _snake(y, alpha):
    """y + sin^2(alpha y) / alpha, of which the period is pi."""
    t = y * alpha * 0.3183098861837907
    s = _sine_of_turns(t - tl.floor(t + 0.5))
    return y + s * s / (alpha + 1e-9)


@triton.jit
def _products(
    x, weight, rows, columns, base, dilation,
    TAPS: tl.constexpr, STRIDE: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Sum over taps and inputs: row t reads rows base + t * STRIDE + tap * dilation of x, [.., CI]."""
    k = tl.arange(0, BK)
    steps: tl.constexpr = CI // BK
    sums = tl.zeros([BT, BN], tl.float32)
    left = (base + rows * STRIDE)[:, None] * CI + k[None, :]
    right = k[:, None] * CO + columns[None, :]
    for i in range(TAPS * steps):
        tap = i // steps
        a = tl.load(x + left + (tap * dilation * CI + (i % steps) * BK))
        b = tl.load(weight + right + i * BK * CO)
        sums = tl.dot(
            a.to(b.dtype), b, sums, input_precision="tf32x3"
        )  # of float32; 16 bits are multiplied as they are
    return sums


@triton.jit(do_not_specialize=["dilation", "next_dilation"])
def conv_kernel(
    x, weight, bias, residual, other, raw, act, alpha, tail_in, tail_out, counts,
    dilation, next_dilation, x_stride, residual_stride, raw_stride, act_stride,
    TAPS: tl.constexpr, TARGETS: tl.constexpr, SLOPE: tl.constexpr, STRIDE: tl.constexpr, RATE: tl.constexpr,
    EXTRA: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    first = tl.load(counts + FIRST)
    n = tl.load(counts + FRAMES) * RATE
    if EXTRA:
        n += first
    first_row = tl.program_id(0) * BT
    if first_row >= n:
        return
    group = tl.program_id(2)
    rows = first_row + tl.arange(0, BT)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (rows < n)[:, None]
    at = rows[:, None] * CO + columns[None, :]

    y = tl.zeros([BT, BN], tl.float32)
    offset: tl.constexpr = 0
    for g in tl.static_range(len(TAPS)):
        if group == g:
            if STRIDE > 1:
                base = first - STRIDE
            else:
                base = (1 - TAPS[g]) * dilation
            y = _products(
                x + g * x_stride, weight + offset * CI * CO, tl.minimum(rows, n - 1), columns, base, dilation,
                TAPS[g], STRIDE, CI, CO, BT, BN, BK,
            )  # fmt: skip
        offset += TAPS[g]
    y += tl.load(bias + group * CO + columns)[None, :]
    if residual is not None:
        y += tl.load(residual + group * residual_stride + at, mask=inside, other=0.0).to(tl.float32)
    if other is not None:
        if EXTRA:  # before its first row stands its second, reflected: an STFT has one frame more than hops
            source = tl.where(rows < first, 1, rows - first)
        else:
            source = rows
        y += tl.load(other + source[:, None] * CO + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if raw is not None:
        tl.store(raw + group * raw_stride + at, y.to(raw.dtype.element_ty), mask=inside)
    if act is not None:
        before = 0
        for e in tl.static_range(len(TARGETS)):
            past = (TARGETS[e] - 1) * next_dilation
            if len(TAPS) == 1 or group == e:
                if SLOPE is None:
                    z = _snake(y, tl.load(alpha + e * CO + columns)[None, :])
                else:
                    z = tl.where(y > 0, y, y * SLOPE)
                emit(
                    z, first_row, columns, n, past, act + e * act_stride,
                    tail_in + before * CO, tail_out + before * CO, CO, BT,
                )  # fmt: skip
            before += past


@triton.jit
def mix_kernel(
    raw, act, tail_in, tail_out, counts, raw_stride,
    GROUPS: tl.constexpr, PAST: tl.constexpr, SLOPE: tl.constexpr, RATE: tl.constexpr, EXTRA: tl.constexpr,
    C: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    n = tl.load(counts + FRAMES) * RATE
    if EXTRA:
        n += tl.load(counts + FIRST)
    first_row = tl.program_id(0) * BT
    if first_row >= n:
        return
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    rows = first_row + tl.arange(0, BT)
    at = rows[:, None] * C + columns[None, :]
    y = tl.zeros([BT, BN], tl.float32)
    for g in tl.static_range(GROUPS):
        y += tl.load(raw + g * raw_stride + at, mask=(rows < n)[:, None], other=0.0).to(tl.float32)
    y = y / GROUPS
    emit(tl.where(y > 0, y, y * SLOPE), first_row, columns, n, PAST, act, tail_in, tail_out, C, BT)


@triton.jit
def overlap_add_kernel(
    x, real, imaginary, weights, out, counts,
    LIMIT: tl.constexpr, MOST: tl.constexpr, RATE: tl.constexpr, OVERLAP: tl.constexpr, BINS: tl.constexpr,
    HOP: tl.constexpr, C: tl.constexpr, NB: tl.constexpr, NH: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    first = tl.load(counts + FIRST)
    n = tl.load(counts + FRAMES) * RATE + first
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    b, j = tl.arange(0, NB), tl.arange(0, NH)
    table = b[:, None] * NH + j[None, :]
    total = tl.zeros([BT, NH], tl.float32)
    weight = tl.zeros([BT, NH], tl.float32)
    for q in tl.static_range(OVERLAP):
        frame = rows - q
        valid = (frame < n) & ((frame >= 0) | (first == 0))
        at = frame[:, None] * C + b[None, :]
        mask = valid[:, None] & (b < BINS)[None, :]
        magnitude = tl.exp(tl.load(x + at, mask=mask, other=0.0))
        magnitude = tl.where(magnitude > MOST, MOST, magnitude)  # a minimum would hide what is not a number
        magnitude = tl.where(mask, magnitude, 0.0)
        angle = _sine(tl.load(x + at + BINS, mask=mask, other=0.0))
        u = angle * angle  # at most 1
        cosine = 1 + u * (-1 / 2 + u * (1 / 24 + u * (-1 / 720 + u * (1 / 40320 - u / 3628800))))
        total += tl.dot(magnitude * cosine, tl.load(real + q * NB * NH + table), input_precision="ieee")
        total += tl.dot(magnitude * _sine(angle), tl.load(imaginary + q * NB * NH + table), input_precision="ieee")
        weight += tl.where(valid[:, None], tl.load(weights + q * NH + j)[None, :], 0.0)
    y = total / tl.where(weight > 0, weight, 1.0)
    y = tl.where(y > LIMIT, LIMIT, tl.where(y < -LIMIT, -LIMIT, y))
    end = n + tl.load(counts + FINAL)
    tl.store(out + rows[:, None] * HOP + j[None, :], y, mask=(rows < end)[:, None] & (j < HOP)[None, :])


@triton.jit
def note_infinite_kernel(x, n, flag, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    finite = tl.abs(tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)) < float("inf")
    if tl.min(finite.to(tl.int32), 0) == 0:
        tl.store(flag, 1)
