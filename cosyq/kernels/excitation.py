"""The vocoder's excitation: from mel frames to the spectrum of a sine and noise signal, chunk by chunk.

It runs one frame ahead of the rest, since a centred transform does: a first chunk has a pitch more than frames.
Pitch and phase are float64, and their roundings to float32 those of the reference: the network was trained on them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cosyq.kernels.launch import Kernel, cdiv, next_power_of_2
from cosyq.kernels.streaming import Extent, Rows, Tile

_pitch_conv = Kernel("excitation", "pitch_conv")
_pitch = Kernel("excitation", "pitch")
_excite = Kernel("excitation", "excite")
_transform = Kernel("excitation", "transform")


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
    _pitch_conv[(cdiv(rows, block.rows), outputs // block.columns)](
        x.start if isinstance(x, Rows) else x, layer.weight, layer.scale, layer.bias,
        into.start, into.tail_in, into.tail_out, counts,
        TAPS=taps, AHEAD=not isinstance(x, Rows), PAST=past, CI=inputs, CO=outputs,
        BT=block.rows, BN=block.columns, BK=block.depth, num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip


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
    _pitch[(cdiv(rows, 4),)](
        x.start, c.classifier, c.classifier_bias, f0, counts, C=channels, BT=4, BK=min(128, channels & -channels)
    )
    _excite[(1,)](
        f0, c.merge, c.merge_bias, into.start, into.tail_in, into.tail_out, phase[0], phase[1], counts,
        SAMPLE_RATE=c.sample_rate, SAMPLES=c.samples_per_frame, SINE=c.sine_amp, NOISE_STD=c.noise_std,
        VOICED=c.voiced_threshold, BT=next_power_of_2(rows), BH=c.merge.shape[0],
    )  # fmt: skip


def transform(
    frames: Rows, noise: Tensor, basis: Tensor, counts: Tensor, *, rows: Extent, hop: int, past: int, into: Rows
) -> None:
    """STFT of tanh(frame[0] + frame[1] * noise): basis [n_fft, channels] float32 is its windowed transform."""
    size, channels = basis.shape
    _transform[(cdiv(rows.most, 64),)](
        frames.start, noise, basis, into.start, into.tail_in, into.tail_out, counts,
        SAMPLES=rows.rate * hop, HOP=hop, N=size, C=channels, PAST=past, BT=64,
    )  # fmt: skip
