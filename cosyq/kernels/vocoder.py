"""The vocoder's layers on a GPU: causal convolutions whose activation, residual and stream tail cost no extra pass.

Signals are rows of channels, [rows, channels], and every buffer that a convolution reads has its past in front: the
rows before row 0 are what the chunk before left. Who writes a buffer (`_emit`) puts the old tail there and hands the
new one on, so a convolution reads plain rows and a chunk of any length gives the same sums in the same order.

Sizes of a launch are those of the longest chunk; how much of it is real stands in `counts` on the device, so that one
recorded graph serves every chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

# counts: int32, what differs from chunk to chunk
FRAMES, PITCHES, FIRST, FINAL, NOISE = (tl.constexpr(i) for i in range(5))
COUNTS = 5
ROWS = 128  # no launch reads or writes further than this behind a buffer's last row


@dataclass(frozen=True)
class Rows:
    """A buffer [margin + rows, channels] with the tails of the streams before and after this chunk.

    The tails [groups][past, channels] of all groups lie one after the other; `data` is [groups, margin + rows, channels].
    """

    data: Tensor
    margin: int
    tail_in: Tensor
    tail_out: Tensor

    @property
    def start(self) -> Tensor:
        """From row 0 of the first group on."""
        return self.data[0, self.margin :]

    @property
    def stride(self) -> int:
        return self.data.stride(0)


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
def _emit(y, first_row, columns, n, past, buffer, tail_in, tail_out, C: tl.constexpr, BT: tl.constexpr, TAIL: tl.constexpr):
    """Store the tile y of rows first_row .. + BT behind the past, and what of it the next chunk needs."""
    rows = first_row + tl.arange(0, BT)
    at = rows[:, None] * C + columns[None, :]
    value = y.to(buffer.dtype.element_ty)
    tl.store(buffer + at, value, mask=(rows < n)[:, None])
    tl.store(tail_out + at + (past - n) * C, value, mask=((rows < n) & (rows >= n - past))[:, None])
    if first_row == 0:
        kept = tl.arange(0, TAIL)
        past_at = kept[:, None] * C + columns[None, :]
        old = tl.load(tail_in + past_at, mask=(kept < past)[:, None], other=0.0)
        tl.store(buffer + past_at - past * C, old, mask=(kept < past)[:, None])
        tl.store(tail_out + past_at - n * C, old, mask=((kept < past) & (kept >= n))[:, None])


@triton.jit
def _products(
    x, weight, rows, columns, base, dilation,
    TAPS: tl.constexpr, STRIDE: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Sum over taps and inputs: row t reads rows base + t * STRIDE + tap * dilation of x."""
    k = tl.arange(0, BK)
    steps: tl.constexpr = CI // BK
    sums = tl.zeros([BT, BN], tl.float32)
    left = (base + rows * STRIDE)[:, None] * CI + k[None, :]
    right = k[:, None] * CO + columns[None, :]
    for i in range(TAPS * steps):
        tap = i // steps
        a = tl.load(x + left + (tap * dilation * CI + (i % steps) * BK))
        b = tl.load(weight + right + i * BK * CO)
        sums = tl.dot(a.to(b.dtype), b, sums)
    return sums


@triton.jit(do_not_specialize=["dilation", "next_dilation"])
def _conv_kernel(
    x, weight, bias, residual, other, raw, act, alpha, tail_in, tail_out, counts,
    dilation, next_dilation, x_stride, residual_stride, raw_stride, act_stride,
    TAPS: tl.constexpr, TARGETS: tl.constexpr, SLOPE: tl.constexpr, STRIDE: tl.constexpr, RATE: tl.constexpr,
    EXTRA: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr, TAIL: tl.constexpr,
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
                x + g * x_stride, weight + offset * CI * CO, rows, columns, base, dilation,
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
                _emit(
                    z, first_row, columns, n, past, act + e * act_stride,
                    tail_in + before * CO, tail_out + before * CO, CO, BT, TAIL,
                )  # fmt: skip
            before += past


@dataclass(frozen=True)
class Extent:
    """How many rows a launch makes: frames * rate, and one more in an utterance's first chunk where `extra`."""

    frames: int  # of the longest chunk
    rate: int
    extra: bool = False

    @property
    def most(self) -> int:
        return self.frames * self.rate + self.extra


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tile(inputs: int, outputs: int) -> Tile:
    columns, depth = min(128, outputs & -outputs), min(64, inputs & -inputs)
    if columns == 128 and inputs > 128:
        return Tile(64, 128, depth, 4, 4)
    return Tile(128, columns, depth, 8 if columns == 128 else 4, 3)


@dataclass(frozen=True)
class Conv:
    """Packed convolutions of one shape, run side by side: weight [sum of taps, inputs, outputs] 16 bit, bias [groups, outputs]."""

    weight: Tensor
    bias: Tensor
    taps: tuple[int, ...]
    stride: int = 1

    @property
    def inputs(self) -> int:
        return self.weight.shape[1]

    @property
    def outputs(self) -> int:
        return self.weight.shape[2]


@dataclass(frozen=True)
class Activation:
    """What a layer's output goes through on its way into the buffer of the layers that read it.

    Readers with `taps` and `dilation` take Snake with alpha [readers, channels] float32, or leaky ReLU with `slope`.
    """

    into: Rows
    taps: tuple[int, ...]
    dilation: int = 1
    alpha: Tensor | None = None
    slope: float | None = None


def conv(
    x: Rows | Tensor,
    layer: Conv,
    counts: Tensor,
    *,
    rows: Extent,
    dilation: int = 1,
    residual: Tensor | None = None,
    other: Tensor | None = None,
    raw: Tensor | None = None,
    act: Activation | None = None,
) -> None:
    """y = layer(x) (+ residual) (+ other); raw = y; act.into = activation(y).

    Args:
        x: the layer's input, one group for each of the layer's; or rows [t, inputs] from row 0 on.
        residual, raw: [groups or 1, rows, outputs]. other: [rows, outputs], one row later where the extent has one more.
        act: for one group the outputs of every reader; for several, group g's for reader g.
    """
    block = tile(layer.inputs, layer.outputs)
    into = None if act is None else act.into
    _conv_kernel[(triton.cdiv(rows.most, block.rows), layer.outputs // block.columns, len(layer.taps))](
        x.start if isinstance(x, Rows) else x, layer.weight, layer.bias, residual, other, raw,
        None if into is None else into.start, None if act is None else act.alpha,
        None if into is None else into.tail_in, None if into is None else into.tail_out, counts,
        dilation, 1 if act is None else act.dilation,
        x.stride if isinstance(x, Rows) else 0, _group_stride(residual), _group_stride(raw), 0 if into is None else into.stride,
        TAPS=layer.taps, TARGETS=() if act is None else act.taps, SLOPE=None if act is None else act.slope,
        STRIDE=layer.stride, RATE=rows.rate, EXTRA=rows.extra, CI=layer.inputs, CO=layer.outputs,
        TAIL=1 if into is None else into.margin,
        BT=block.rows, BN=block.columns, BK=block.depth, num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip


def _group_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)


@triton.jit
def _mix_kernel(
    raw, act, tail_in, tail_out, counts, raw_stride,
    GROUPS: tl.constexpr, PAST: tl.constexpr, SLOPE: tl.constexpr, RATE: tl.constexpr, EXTRA: tl.constexpr,
    C: tl.constexpr, TAIL: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
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
    _emit(tl.where(y > 0, y, y * SLOPE), first_row, columns, n, PAST, act, tail_in, tail_out, C, BT, TAIL)


def mix(raw: Tensor, counts: Tensor, *, rows: Extent, act: Activation) -> None:
    """act.into = leaky_relu(mean of raw [groups, rows, channels] over its groups)."""
    groups, _, channels = raw.shape
    columns = min(64, channels & -channels)
    _mix_kernel[(triton.cdiv(rows.most, 64), channels // columns)](
        raw, act.into.start, act.into.tail_in, act.into.tail_out, counts, raw.stride(0),
        GROUPS=groups, PAST=(act.taps[0] - 1) * act.dilation, SLOPE=act.slope, RATE=rows.rate, EXTRA=rows.extra,
        C=channels, TAIL=act.into.margin, BT=64, BN=columns,
    )  # fmt: skip


@triton.jit
def _pitch_conv_kernel(
    x, weight, scale, bias, act, tail_in, tail_out, counts,
    TAPS: tl.constexpr, AHEAD: tl.constexpr, PAST: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr, TAIL: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n = tl.load(counts + PITCHES)
    first_row = tl.program_id(0) * BT
    if (first_row >= n) & (first_row > 0):
        return
    if AHEAD:  # the mel starts at the frame before, but for the first chunk
        base = 1 - tl.load(counts + FIRST)
    else:
        base = 1 - TAPS
    rows = first_row + tl.arange(0, BT)
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
    _emit(y, first_row, columns, n, PAST, act, tail_in, tail_out, CO, BT, TAIL)


@dataclass(frozen=True)
class PitchLayer:
    """A float64 convolution: weight [taps, inputs, outputs] float32, each output times scale, plus bias [outputs] float64."""

    weight: Tensor
    scale: Tensor
    bias: Tensor


def pitch_conv(x: Rows | Tensor, layer: PitchLayer, counts: Tensor, *, rows: int, past: int, into: Rows) -> None:
    """into = elu(layer(x)); x is the mel [frames, inputs], which is looked ahead in, or what the layer before made."""
    taps, inputs, outputs = layer.weight.shape
    _pitch_conv_kernel[(triton.cdiv(rows, 16), outputs // 16)](
        x.start if isinstance(x, Rows) else x, layer.weight, layer.scale, layer.bias,
        into.start, into.tail_in, into.tail_out, counts,
        TAPS=taps, AHEAD=not isinstance(x, Rows), PAST=past, CI=inputs, CO=outputs, TAIL=into.margin,
        BT=16, BN=16, BK=min(32, inputs & -inputs),
    )  # fmt: skip


@triton.jit
def _pitch_kernel(x, weight, bias, f0, counts, C: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    n = tl.load(counts + PITCHES)
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    k = tl.arange(0, BK)
    products = tl.zeros([BT, BK], tl.float64)
    for i in range(C // BK):
        value = tl.load(x + rows[:, None] * C + (i * BK + k)[None, :], mask=(rows < n)[:, None], other=0.0)
        products += value * tl.load(weight + i * BK + k)[None, :]
    tl.store(f0 + rows, tl.abs(tl.sum(products, 1) + tl.load(bias)).to(tl.float32), mask=rows < n)


@triton.jit
def _excitation_kernel(
    f0, weight, bias, frames, tail_in, tail_out, phase_in, phase_out, counts,
    SAMPLE_RATE: tl.constexpr, SAMPLES: tl.constexpr, SINE: tl.constexpr, NOISE_STD: tl.constexpr, VOICED: tl.constexpr,
    TAIL: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    n = tl.load(counts + PITCHES)
    rows = tl.arange(0, BT)
    h = tl.arange(0, BH)
    pitch = tl.load(f0 + rows, mask=rows < n, other=0.0)
    turns = tl.div_rn(pitch[:, None] * (h + 1).to(tl.float32)[None, :], tl.full([BT, BH], SAMPLE_RATE, tl.float32))
    turns -= tl.floor(turns)  # of one sample
    total = tl.cumsum(turns.to(tl.float64), 0) + tl.load(phase_in + h)[None, :]
    tl.store(phase_out + h, tl.sum(tl.where((rows == tl.maximum(n - 1, 0))[:, None], total, 0.0), 0))
    phase = total.to(tl.float32) * 2 * 3.141592653589793 * SAMPLES
    voiced = (pitch > VOICED).to(tl.float32)
    sines = tl.sum(tl.sin(phase) * SINE * tl.load(weight + h)[None, :], 1) * voiced
    amplitude = voiced * NOISE_STD + (1 - voiced) * SINE / 3
    y = tl.join(sines + tl.load(bias), amplitude)
    _emit(y, 0, tl.arange(0, 2), n, 2, frames, tail_in, tail_out, 2, BT, TAIL)


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


def excitation(
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
    _excitation_kernel[(1,)](
        f0, c.merge, c.merge_bias, into.start, into.tail_in, into.tail_out, phase[0], phase[1], counts,
        SAMPLE_RATE=c.sample_rate, SAMPLES=c.samples_per_frame, SINE=c.sine_amp, NOISE_STD=c.noise_std,
        VOICED=c.voiced_threshold, TAIL=into.margin, BT=triton.next_power_of_2(rows), BH=c.merge.shape[0],
    )  # fmt: skip


@triton.jit
def _spectrum_kernel(
    frames, noise, basis, act, tail_in, tail_out, counts,
    SAMPLES: tl.constexpr, HOP: tl.constexpr, N: tl.constexpr, C: tl.constexpr, PAST: tl.constexpr, TAIL: tl.constexpr,
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
    v = 1 - 2 / (tl.exp(2 * v) + 1)  # tanh
    columns = tl.arange(0, C)
    y = tl.dot(v, tl.load(basis + tl.arange(0, N)[:, None] * C + columns[None, :]), input_precision="ieee")
    _emit(y, first_row, columns, n, PAST, act, tail_in, tail_out, C, BT, TAIL)


def spectrum(
    frames: Rows, noise: Tensor, basis: Tensor, counts: Tensor, *, rows: Extent, hop: int, past: int, into: Rows
) -> None:
    """STFT of tanh(frame[0] + frame[1] * noise): basis [n_fft, channels] float32 is its windowed transform."""
    size, channels = basis.shape
    _spectrum_kernel[(triton.cdiv(rows.most, 64),)](
        frames.start, noise, basis, into.start, into.tail_in, into.tail_out, counts,
        SAMPLES=rows.rate * hop, HOP=hop, N=size, C=channels, PAST=past, TAIL=into.margin, BT=64,
    )  # fmt: skip


@triton.jit
def _overlap_add_kernel(
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
    y = total / weight
    y = tl.where(y > LIMIT, LIMIT, tl.where(y < -LIMIT, -LIMIT, y))
    end = n + tl.load(counts + FINAL)
    tl.store(out + rows[:, None] * HOP + j[None, :], y, mask=(rows < end)[:, None] & (j < HOP)[None, :])


@dataclass(frozen=True)
class Inverse:
    """Tables of the windowed inverse transform, by how many hops ago a frame began.

    real, imaginary [n_fft / hop, bins padded to 16, hop padded to 16]; weights [n_fft / hop, hop padded to 16], the
    window's squares. All float32.
    """

    real: Tensor
    imaginary: Tensor
    weights: Tensor
    bins: int
    hop: int


def overlap_add(
    x: Rows, tables: Inverse, counts: Tensor, *, rows: Extent, limit: float, most: float, out: Tensor
) -> None:
    """Log magnitudes and phases x to samples out [rows + 1, hop] float32 in +-limit; magnitudes are at most `most`."""
    overlap, bins, hops = tables.real.shape
    _overlap_add_kernel[(triton.cdiv(rows.most + 1, 32),)](
        x.start, tables.real, tables.imaginary, tables.weights, out, counts,
        LIMIT=limit, MOST=most, RATE=rows.rate, OVERLAP=overlap, BINS=tables.bins, HOP=tables.hop,
        C=x.data.shape[-1], NB=bins, NH=hops, BT=32,
    )  # fmt: skip
