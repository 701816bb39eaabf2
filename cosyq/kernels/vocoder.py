"""The vocoder's layers: causal convolutions whose activation, residual and stream tail cost no extra pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cosyq.kernels.launch import Kernel, cdiv
from cosyq.kernels.streaming import Extent, Rows, Tile

_conv = Kernel("vocoder", "conv")
_mix = Kernel("vocoder", "mix")
_overlap_add = Kernel("vocoder", "overlap_add")
_note_infinite = Kernel("vocoder", "note_infinite")


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
    _conv[(cdiv(rows.most, block.rows), layer.outputs // block.columns, len(layer.taps))](
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


def mix(raw: Tensor, counts: Tensor, *, rows: Extent, act: Activation) -> None:
    """act.into = leaky_relu(mean of raw [groups, rows, channels] over its groups)."""
    groups, _, channels = raw.shape
    columns = min(64, channels & -channels)
    _mix[(cdiv(rows.most, 64), channels // columns)](
        raw, act.into.start, act.into.tail_in, act.into.tail_out, counts, raw.stride(0),
        GROUPS=groups, PAST=(act.taps[0] - 1) * act.dilation, SLOPE=act.slope, RATE=rows.rate, EXTRA=rows.extra,
        C=channels, BT=64, BN=columns,
    )  # fmt: skip


def note_infinite(weight: Tensor, flag: Tensor) -> None:
    """flag, int32 [1], is 1 if not all of `weight` is finite, and left alone if it is."""
    size = 4096
    _note_infinite[(cdiv(weight.numel(), size),)](weight, weight.numel(), flag, SIZE=size)


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
    _overlap_add[(cdiv(rows.most + 1, 32),)](
        x.start, tables.real, tables.imaginary, tables.weights, out, counts,
        LIMIT=limit, MOST=most, RATE=rows.rate, OVERLAP=overlap, BINS=tables.bins, HOP=tables.hop,
        C=x.data.shape[-1], NB=bins, NH=hops, BT=32,
    )  # fmt: skip
