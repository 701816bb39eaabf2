"""The vocoder's layers: causal convolutions whose activation, residual and stream tail cost no extra pass."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from cosyq.kernels.streaming import FINAL, FIRST, FRAMES, Extent, Rows, Tile, emit


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
def _conv_kernel(
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


def tile(inputs: int, outputs: int) -> Tile:
    """Small tiles: a chunk has few rows, and on an H100 larger ones were slower at every length (docs/speed.md)."""
    return Tile(rows=64, columns=min(64, outputs & -outputs), depth=min(64, inputs & -inputs), warps=4, stages=4)


@dataclass(frozen=True)
class Conv:
    """Convolutions side by side, that differ in taps: weight [sum of taps, inputs, outputs], bias [groups, outputs]."""

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
        residual, raw: [groups or 1, rows, outputs].
        other: [rows, outputs]; where the extent has one row more, a row later.
        act: for one group the outputs of every reader; for several, group g's for reader g.
    """
    block = tile(layer.inputs, layer.outputs)
    into = None if act is None else act.into
    _conv_kernel[(triton.cdiv(rows.most, block.rows), layer.outputs // block.columns, len(layer.taps))](
        x.start if isinstance(x, Rows) else x, layer.weight, layer.bias, residual, other, raw,
        None if into is None else into.start, None if act is None else act.alpha,
        None if into is None else into.tail_in, None if into is None else into.tail_out, counts,
        dilation, 1 if act is None else act.dilation,
        x.stride if isinstance(x, Rows) else 0, _group_stride(residual), _group_stride(raw),
        0 if into is None else into.stride,
        TAPS=layer.taps, TARGETS=() if act is None else act.taps, SLOPE=None if act is None else act.slope,
        STRIDE=layer.stride, RATE=rows.rate, EXTRA=rows.extra, CI=layer.inputs, CO=layer.outputs,
        BT=block.rows, BN=block.columns, BK=block.depth, num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip


def _group_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)


@triton.jit
def _mix_kernel(
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


def mix(raw: Tensor, counts: Tensor, *, rows: Extent, act: Activation) -> None:
    """act.into = leaky_relu(mean of raw [groups, rows, channels] over its groups)."""
    groups, _, channels = raw.shape
    columns = min(64, channels & -channels)
    _mix_kernel[(triton.cdiv(rows.most, 64), channels // columns)](
        raw, act.into.start, act.into.tail_in, act.into.tail_out, counts, raw.stride(0),
        GROUPS=groups, PAST=(act.taps[0] - 1) * act.dilation, SLOPE=act.slope, RATE=rows.rate, EXTRA=rows.extra,
        C=channels, BT=64, BN=columns,
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
    y = total / tl.where(weight > 0, weight, 1.0)
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
