"""The vocoder's excitation: from mel frames to the spectrum of a sine and noise signal, chunk by chunk.

It runs one frame ahead of the rest, since a centred transform does: a first chunk has a pitch more than frames.
Pitch and phase are float64, and their roundings to float32 those of the reference: the network was trained on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from cosyq.kernels.streaming import FINAL, FIRST, FRAMES, NOISE, Extent, Rows, Tile, emit


@triton.jit
def _pitch_conv_kernel(
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


@dataclass(frozen=True)
class PitchLayer:
    """A float64 convolution: weight [taps, inputs, outputs] float32; scale of and bias to each output, float64."""

    weight: Tensor
    scale: Tensor
    bias: Tensor


def pitch_tile(inputs: int) -> Tile:
    return Tile(rows=16, columns=16, depth=min(32, inputs & -inputs), warps=4, stages=3)


def pitch_conv(x: Rows | Tensor, layer: PitchLayer, counts: Tensor, *, rows: int, past: int, into: Rows) -> None:
    """into = elu(layer(x)); x is the mel [frames, inputs], which is looked ahead in, or what the layer before made."""
    taps, inputs, outputs = layer.weight.shape
    block = pitch_tile(inputs)
    _pitch_conv_kernel[(triton.cdiv(rows, block.rows), outputs // block.columns)](
        x.start if isinstance(x, Rows) else x, layer.weight, layer.scale, layer.bias,
        into.start, into.tail_in, into.tail_out, counts,
        TAPS=taps, AHEAD=not isinstance(x, Rows), PAST=past, CI=inputs, CO=outputs,
        BT=block.rows, BN=block.columns, BK=block.depth, num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip


@triton.jit
def _pitch_kernel(x, weight, bias, f0, counts, C: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    n = tl.load(counts + FRAMES) + tl.load(counts + FIRST)
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    k = tl.arange(0, BK)
    products = tl.zeros([BT, BK], tl.float64)
    for i in range(C // BK):
        value = tl.load(x + rows[:, None] * C + (i * BK + k)[None, :], mask=(rows < n)[:, None], other=0.0)
        products += value * tl.load(weight + i * BK + k)[None, :]
    tl.store(f0 + rows, tl.abs(tl.sum(products, 1) + tl.load(bias)).to(tl.float32), mask=rows < n)


@triton.jit
def _excite_kernel(
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


@dataclass(frozen=True)
class SourceConstants:
    """What turns the last pitch layer's output into the excitation: float64 classifier, float32 merge of the harmonics.

    classifier [channels], classifier_bias [1], merge [harmonics, padded by zeros to a power of two], merge_bias [1].
    """

    classifier: Tensor
    classifier_bias: Tensor
    merge: Tensor
    merge_bias: Tensor
    sample_rate: int
    samples_per_frame: int
    sine_amp: float
    noise_std: float
    voiced_threshold: float


def excite(
    x: Rows,
    constants: SourceConstants,
    counts: Tensor,
    *,
    rows: int,
    f0: Tensor,
    into: Rows,
    phase: tuple[Tensor, Tensor],
) -> None:
    """Frames [rows, 2] of what the noise is added to and multiplied by; `phase` (before, after) [harmonics] float64."""
    channels, c = x.data.shape[-1], constants
    _pitch_kernel[(triton.cdiv(rows, 4),)](
        x.start, c.classifier, c.classifier_bias, f0, counts, C=channels, BT=4, BK=min(128, channels & -channels)
    )
    _excite_kernel[(1,)](
        f0, c.merge, c.merge_bias, into.start, into.tail_in, into.tail_out, phase[0], phase[1], counts,
        SAMPLE_RATE=c.sample_rate, SAMPLES=c.samples_per_frame, SINE=c.sine_amp, NOISE_STD=c.noise_std,
        VOICED=c.voiced_threshold, BT=triton.next_power_of_2(rows), BH=c.merge.shape[0],
    )  # fmt: skip


@triton.jit
def _tanh(x):
    """By its series where the formula would leave a small number few digits: voices are of hundredths."""
    u = x * x
    return tl.where(u < 0.01, x * (1 + u * (-1 / 3 + u * (2 / 15 - u * 17 / 315))), 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def _transform_kernel(
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


def transform(
    frames: Rows, noise: Tensor, basis: Tensor, counts: Tensor, *, rows: Extent, hop: int, past: int, into: Rows
) -> None:
    """STFT of tanh(frame[0] + frame[1] * noise): basis [n_fft, channels] float32 is its windowed transform."""
    size, channels = basis.shape
    _transform_kernel[(triton.cdiv(rows.most, 64),)](
        frames.start, noise, basis, into.start, into.tail_in, into.tail_out, counts,
        SAMPLES=rows.rate * hop, HOP=hop, N=size, C=channels, PAST=past, BT=64,
    )  # fmt: skip
