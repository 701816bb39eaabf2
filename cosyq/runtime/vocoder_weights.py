"""A reference vocoder's weights as its kernels read them.

Channels are padded by zeros to what a tensor core multiplies, side-by-side blocks lie one after the other, the longest
kernel first. Repeating each frame `rate` times before a convolution is folded into it: it becomes a convolution over
frames with `rate` times the outputs, of a third of the work or less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyq.errors import DeviceError
from cosyq.kernels.excitation import PitchLayer, SourceConstants
from cosyq.kernels.streaming import MARGIN
from cosyq.kernels.vocoder import Conv, Inverse, note_infinite
from cosyq.model.config import VocoderConfig
from cosyq.model.vocoder import PitchConv, ResBlock, Vocoder, length_over_norm

REMEDY = "use --engine reference"


@dataclass(frozen=True)
class Pair:
    """One step of side-by-side residual blocks: two convolutions, the first dilated, and Snake in front of each."""

    first: Conv
    second: Conv
    first_alpha: Tensor  # [blocks, channels] float32
    second_alpha: Tensor
    dilation: int


@dataclass(frozen=True)
class Stage:
    """One step of upsampling: `up` from the stage before, `down` from the excitation's spectrum, then the blocks."""

    up: Conv
    down: Conv
    source: tuple[Pair, ...]
    blocks: tuple[Pair, ...]
    rate: int  # rows a mel frame


@dataclass(frozen=True)
class Weights:
    pre: Conv
    stages: tuple[Stage, ...]
    post: Conv
    pitch: tuple[PitchLayer, ...]
    source: SourceConstants
    basis: Tensor  # [n_fft, spectrum's channels] float32: windowed transform, real parts and then imaginary
    inverse: Inverse

    @property
    def convolutions(self) -> Iterator[Conv]:
        """All whose weights have the convolutions' type, and the last."""
        yield from (self.pre, self.post)
        for stage in self.stages:
            yield from (stage.up, stage.down)
            for pair in (*stage.source, *stage.blocks):
                yield from (pair.first, pair.second)

    @property
    def pitch_pasts(self) -> tuple[int, ...]:
        """Rows of each pitch layer's output that the next one reaches back for."""
        return (*(layer.weight.shape[0] - 1 for layer in self.pitch[1:]), 0)

    @property
    def spectrum_past(self) -> int:
        """Frames of the excitation's spectrum that the strided convolutions reach back for."""
        return max(stage.down.stride for stage in self.stages)


def pack(vocoder: Vocoder, dtype: torch.dtype) -> Weights:
    """The weights on the vocoder's device, in memory of their own; those of the convolutions as `dtype`.

    Raises:
        DeviceError: they do not fit `dtype`, or the dimensions are none that the kernels know.
    """
    c = vocoder.config
    _check(c)
    count = len(c.resblock_kernels)
    order = sorted(range(count), key=lambda k: -c.resblock_kernels[k])
    stages = []
    for i, (up, rate) in enumerate(zip(vocoder.ups, c.upsample_rates, strict=True)):
        down, blocks = vocoder.source_downs[i], vocoder.resblocks[i * count : (i + 1) * count]
        stages.append(
            Stage(
                up=_polyphase(up, rate, dtype),
                down=_conv([down], dtype, stride=down.stride[0]),
                source=_pairs([vocoder.source_resblocks[i]], dtype),
                blocks=_pairs([blocks[k] for k in order], dtype),
                rate=math.prod(c.upsample_rates[: i + 1]),
            )
        )
    weights = Weights(
        pre=_conv([vocoder.conv_pre], dtype),
        stages=tuple(stages),
        post=_conv([vocoder.conv_post], torch.float32),
        pitch=tuple(_pitch_layer(layer) for layer in vocoder.f0_predictor.convs),
        source=_source_constants(vocoder),
        basis=_analysis(c.n_fft, vocoder.conv_pre.weight.device),
        inverse=_synthesis(c.n_fft, c.hop, vocoder.conv_pre.weight.device),
    )
    strange = torch.zeros(1, dtype=torch.int32, device=vocoder.conv_pre.weight.device)
    for conv in weights.convolutions:
        note_infinite(conv.weight, strange)
    if strange.item():
        raise DeviceError("a weight of the vocoder does not fit 16 bits", remedy=REMEDY)
    return weights


def _check(c: VocoderConfig) -> None:
    dilation = max(d for dilations in (*c.resblock_dilations, *c.source_dilations) for d in dilations)
    fits = (
        all(dilations == c.resblock_dilations[0] for dilations in c.resblock_dilations)
        and (max(*c.resblock_kernels, *c.source_kernels) - 1) * dilation <= MARGIN
        and max(*c.f0_kernels, *c.upsample_kernels, c.stft_per_frame // c.upsample_rates[0]) <= MARGIN
        and c.n_fft == 16
        and c.n_fft % c.hop == 0
        and c.samples_per_frame >= c.n_fft
    )
    if not fits:
        raise DeviceError("the vocoder's dimensions are none that its kernels know", remedy=REMEDY)


def width(channels: int) -> int:
    """Channels as the kernels lay them out."""
    return -(-channels // 16) * 16


def _padded(vector: Tensor) -> Tensor:
    return F.pad(vector, (0, width(vector.shape[-1]) - vector.shape[-1]))


def _taps_first(weight: Tensor) -> Tensor:
    """[outputs, inputs, taps] -> [taps, inputs, outputs], padded."""
    return F.pad(_padded(weight.permute(2, 1, 0)), (0, 0, 0, width(weight.shape[1]) - weight.shape[1])).contiguous()


def _conv(convs: Sequence[nn.Conv1d], dtype: torch.dtype, stride: int = 1) -> Conv:
    weight = torch.cat([_taps_first(conv.weight) for conv in convs])
    bias = torch.stack([_padded(conv.bias.float()) for conv in convs])
    return Conv(weight.to(dtype), bias, tuple(conv.kernel_size[0] for conv in convs), stride)


def _polyphase(up: nn.Conv1d, rate: int, dtype: torch.dtype) -> Conv:
    """Tap k of output t * rate + p reads frame t + floor((p - past + k) / rate): sum what falls on the same frame."""
    past = up.kernel_size[0] - 1
    taps = -(-past // rate) + 1
    weight = _taps_first(up.weight).double()
    folded = weight.new_zeros(taps, weight.shape[1], rate, weight.shape[2])
    for phase in range(rate):
        for k in range(past + 1):
            folded[taps - 1 + (phase - past + k) // rate, :, phase] += weight[k]
    bias = _padded(up.bias.float()).repeat(rate)
    return Conv(folded.flatten(2).to(dtype), bias[None], (taps,))


def _pairs(blocks: Sequence[ResBlock], dtype: torch.dtype) -> tuple[Pair, ...]:
    return tuple(
        Pair(
            first=_conv([block.convs1[j] for block in blocks], dtype),
            second=_conv([block.convs2[j] for block in blocks], dtype),
            first_alpha=torch.stack([_padded(block.activations1[j].alpha.float()) for block in blocks]),
            second_alpha=torch.stack([_padded(block.activations2[j].alpha.float()) for block in blocks]),
            dilation=blocks[0].convs1[j].dilation[0],
        )
        for j in range(len(blocks[0].convs1))
    )


def _pitch_layer(conv: PitchConv) -> PitchLayer:
    """The direction stays float32 as it was published, half the bytes; its length goes to the outputs, in float64."""
    # On the host: it is little, and a GPU's kernels for it, used for nothing else, take 50 ms to load.
    scale = length_over_norm(conv.weight_g.cpu(), conv.weight_v.cpu()).to(conv.bias.device)
    return PitchLayer(_taps_first(conv.weight_v.float()), _padded(scale), _padded(conv.bias.double()))


def _source_constants(vocoder: Vocoder) -> SourceConstants:
    c, linear = vocoder.config, vocoder.source.linear
    classifier = vocoder.f0_predictor.classifier
    return SourceConstants(
        classifier=_padded(classifier.weight[0].double()),
        classifier_bias=classifier.bias.double(),
        merge=_padded(linear.weight[0].float()),
        merge_bias=linear.bias.float().clone(),
        sample_rate=c.sample_rate,
        samples_per_frame=c.samples_per_frame,
        sine_amp=c.sine_amp,
        noise_std=c.noise_std,
        voiced_threshold=c.voiced_threshold,
    )


def _angles(n_fft: int) -> Tensor:
    """2 pi n bin / n_fft, [n_fft, bins] float64."""
    return torch.outer(torch.arange(n_fft), torch.arange(n_fft // 2 + 1)).double() * (2 * torch.pi / n_fft)


def _analysis(n_fft: int, device: torch.device) -> Tensor:
    window = torch.hann_window(n_fft, periodic=True, dtype=torch.float64)[:, None]
    angles = _angles(n_fft)
    return _padded(torch.cat([window * angles.cos(), -window * angles.sin()], dim=1)).float().to(device)


def _synthesis(n_fft: int, hop: int, device: torch.device) -> Inverse:
    window = torch.hann_window(n_fft, periodic=True, dtype=torch.float64)
    angles = _angles(n_fft)
    twice = torch.full((angles.shape[1],), 2.0, dtype=torch.float64)
    twice[[0, -1]] = 1.0  # all other bins stand for their mirror image, too
    scale = twice * window[:, None] / n_fft

    def by_hop(table: Tensor) -> Tensor:  # [n_fft, bins] -> [n_fft / hop, bins, hop], padded
        table = _padded(table.view(n_fft // hop, hop, -1)).transpose(1, 2)
        return _padded(table).float().contiguous().to(device)

    return Inverse(
        real=by_hop(scale * angles.cos()),
        imaginary=by_hop(-scale * angles.sin()),
        weights=_padded(window.square().view(n_fft // hop, hop)).float().to(device),
        bins=n_fft // 2 + 1,
        hop=hop,
    )
