"""The vocoder's excitation, see `cosyq.kernels.excitation`."""

from __future__ import annotations

import triton
import triton.language as tl

from cosyq.kernels.device.streaming import FINAL, FIRST, FRAMES, NOISE, emit


@triton.jit
def pitch_conv_kernel(
    x, weight, scale, bias, act, tail_in, tail_out, counts,
    TAPS: tl.constexpr, AHEAD: tl.constexpr, PAST: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    first = tl.load(counts + FIRST)
    n = tl.load(counts + FRAMES) + first
    first_row = tl.program_id(0) * BT
    if first_row >= n:
        return
    if AHEAD:  # the mel starts at the frame before, but for the first chunk
        base = 1 - first
    else:
        base = 1 - TAPS
    rows = tl.minimum(first_row + tl.arange(0, BT), n - 1)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    steps: tl.constexpr = CI // BK
    sums = tl.zeros([BT, BN], tl.float64)
    for i in range(TAPS * steps):
        a = tl.load(x + (base + rows + i // steps)[:, None] * CI + ((i % steps) * BK + k)[None, :])
        b = tl.load(weight + (i * BK + k)[:, None] * CO + columns[None, :])
        sums = tl.dot(a.to(tl.float64), b.to(tl.float64), sums, out_dtype=tl.float64)
    y = sums * tl.load(scale + columns)[None, :] + tl.load(bias + columns)[None, :]
    y = tl.where(y > 0, y, tl.exp(tl.minimum(y, 0.0)) - 1)
    emit(y, first_row, columns, n, PAST, act, tail_in, tail_out, CO, BT)


@triton.jit
def pitch_kernel(x, weight, bias, f0, counts, C: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    n = tl.load(counts + FRAMES) + tl.load(counts + FIRST)
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    k = tl.arange(0, BK)
    products = tl.zeros([BT, BK], tl.float64)
    for i in range(C // BK):
        value = tl.load(x + rows[:, None] * C + (i * BK + k)[None, :], mask=(rows < n)[:, None], other=0.0)
        products += value * tl.load(weight + i * BK + k)[None, :]
    tl.store(f0 + rows, tl.abs(tl.sum(products, 1) + tl.load(bias)).to(tl.float32), mask=rows < n)


@triton.jit
def excite_kernel(
    f0, weight, bias, frames, tail_in, tail_out, phase_in, phase_out, counts,
    SAMPLE_RATE: tl.constexpr, SAMPLES: tl.constexpr, SINE: tl.constexpr, NOISE_STD: tl.constexpr, VOICED: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    n = tl.load(counts + FRAMES) + tl.load(counts + FIRST)
    rows = tl.arange(0, BT)
    h = tl.arange(0, BH)
    pitch = tl.load(f0 + rows, mask=rows < n, other=0.0)
    turns = tl.div_rn(pitch[:, None] * (h + 1).to(tl.float32)[None, :], tl.full([BT, BH], SAMPLE_RATE, tl.float32))
    turns -= tl.floor(turns)  # of one sample
    total = tl.cumsum(turns.to(tl.float64), 0) + tl.load(phase_in + h)[None, :]
    tl.store(phase_out + h, tl.sum(tl.where((rows == n - 1)[:, None], total, 0.0), 0))
    phase = total.to(tl.float32) * 2 * 3.141592653589793 * SAMPLES
    voiced = (pitch > VOICED).to(tl.float32)
    sines = tl.sum(tl.sin(phase) * SINE * tl.load(weight + h)[None, :], 1) * voiced
    amplitude = voiced * NOISE_STD + (1 - voiced) * SINE / 3
    y = tl.join(sines + tl.load(bias), amplitude)
    emit(y, 0, tl.arange(0, 2), n, 2, frames, tail_in, tail_out, 2, BT)


@triton.jit
def _tanh(x):
    """By its series where the formula would leave a small number few digits: voices are of hundredths."""
    u = x * x
    return tl.where(u < 0.01, x * (1 + u * (-1 / 3 + u * (2 / 15 - u * 17 / 315))), 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def transform_kernel(
    frames, noise, basis, act, tail_in, tail_out, counts,
    SAMPLES: tl.constexpr, HOP: tl.constexpr, N: tl.constexpr, C: tl.constexpr, PAST: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    count = tl.load(counts + FRAMES)
    first = tl.load(counts + FIRST)
    n = count * (SAMPLES // HOP) + first
    first_row = tl.program_id(0) * BT
    if first_row >= n:
        return
    rows = first_row + tl.arange(0, BT)
    s = (rows + 1 - first)[:, None] * HOP + (tl.arange(0, N) - N // 2)[None, :]  # sample, from the chunk's first on
    end = count * SAMPLES
    s = tl.where((first == 1) & (s < 0), -s, s)
    s = tl.where((tl.load(counts + FINAL) == 1) & (s >= end), 2 * end - 2 - s, s)
    inside = (rows < n)[:, None]
    frame = ((s + SAMPLES) // SAMPLES - 2 + first) * 2
    start = tl.load(frames + frame, mask=inside, other=0.0)
    amplitude = tl.load(frames + frame + 1, mask=inside, other=0.0)
    v = start + amplitude * tl.load(noise + tl.load(counts + NOISE) + s, mask=inside, other=0.0)
    v = _tanh(v)
    columns = tl.arange(0, C)
    y = tl.dot(v, tl.load(basis + tl.arange(0, N)[:, None] * C + columns[None, :]), input_precision="ieee")
    emit(y, first_row, columns, n, PAST, act, tail_in, tail_out, C, BT)
