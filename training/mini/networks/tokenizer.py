"""The speech tokenizer: Whisper's log-mel to 25 ids a second by finite scalar quantization (arXiv 2309.15505)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS, DIMENSIONS = 3, 8
BOUND = 0.999  # tanh of anything stays inside the outer levels' rounding
DOWNSAMPLING = 4
WIDTH, DEPTH = 160, 4
QUIET = -6.0  # about the mean of a log mel
GAIN = math.log(3)  # tanh(GAIN / 2) is 1/2: unit variance falls on the three levels about equally
NOISE = 0.2  # of a unit; a value near a rounding edge becomes another level, so training moves values off the edges


class ConvBlock(nn.Module):
    """Depthwise convolution and an MLP a frame (ConvNeXt, arXiv 2201.03545), over [b, t, width]."""

    def __init__(self, width: int, kernel: int = 11):
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """mask [b, t, 1]: 1 on frames, 0 on padding, which must look like the zeros beyond the end."""
        h = self.depthwise((x * mask).transpose(1, 2)).transpose(1, 2)
        return x + self.down(F.gelu(self.up(self.norm(h))))


class Spread(nn.Module):
    """Zero mean and unit variance in every channel over all tokens: none can settle on a single level.

    Left to itself the projection finds a few codes that carry most of the loudness and stays there (a first
    training ended with 98 of the 6,561). Training takes the batch's own statistics, inference the running ones.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int, momentum: float = 0.05):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [b, n, channels] float32, mask [b, n, 1] -> [b, n, channels]."""
        mean, variance = self.mean, self.variance
        if self.training:
            count = mask.sum()
            mean = (x * mask).sum((0, 1)) / count
            variance = ((x - mean).square() * mask).sum((0, 1)) / count
            with torch.no_grad():
                self.mean.lerp_(mean, self.momentum)
                self.variance.lerp_(variance, self.momentum)
        x = (x - mean) * torch.rsqrt(variance + 1e-5)
        return x + NOISE * torch.randn_like(x) if self.training else x


class SpeechTokenizer(nn.Module):
    """Length rule of the published tokenizer: two halvings, each rounded up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(128, WIDTH, 3, stride=2, padding=1)
        self.conv2 = nn.Conv1d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(ConvBlock(WIDTH) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.project = nn.Linear(WIDTH, DIMENSIONS)
        self.spread = Spread(DIMENSIONS)

    def encode(self, feats: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """feats [b, 128, t], lengths [b] -> values before rounding [b, t/4, 8] in -1..1, mask [b, t/4, 1]."""
        positions = torch.arange(feats.shape[-1], device=feats.device)
        mask = (positions < lengths[:, None]).to(feats.dtype)[:, None]
        x = F.gelu(self.conv1(feats * mask))
        mask = mask[..., ::2]
        x = F.gelu(self.conv2(x * mask)).transpose(1, 2)
        mask = mask[..., ::2].transpose(1, 2)
        for block in self.blocks:
            x = block(x, mask)
        spread = self.spread(self.project(self.norm(x)).float(), mask)
        return torch.tanh(GAIN * spread) * BOUND, mask

    def forward(self, feats: Tensor, lengths: Tensor) -> Tensor:
        """Ids [b, t/4] int32, the first dimension the least digit; what the ONNX file computes."""
        values, _ = self.encode(feats, lengths)
        digits = torch.round(values).to(torch.int32) + 1
        powers = LEVELS ** torch.arange(DIMENSIONS, dtype=torch.int32, device=feats.device)
        return (digits * powers).sum(-1, dtype=torch.int32)


def quantize(values: Tensor) -> Tensor:
    """Round, with the gradient passed straight through."""
    return values + (values.round() - values).detach()


def correlation(values: Tensor, mask: Tensor) -> Tensor:
    """Mean square of the correlations between different channels of values [b, n, 8]: what they say twice."""
    flat = values.flatten(0, 1)[mask.flatten() > 0]
    flat = F.normalize(flat - flat.mean(0), dim=0)
    channels = flat.shape[1]
    return ((flat.T @ flat).square().sum() - channels) / (channels * (channels - 1))


class Heads(nn.Module):
    """What the codes are trained to hold, thrown away afterwards: the mel, given who speaks, and the phonemes."""

    def __init__(self, speakers: int, phonemes: int, mel: int, width: int = 256):
        super().__init__()
        self.enter = nn.Linear(DIMENSIONS, width)
        self.speaker = nn.Embedding(speakers, width)
        self.mel_blocks = nn.ModuleList(ConvBlock(width) for _ in range(4))
        self.mel = nn.Linear(width, 2 * mel)
        nn.init.constant_(self.mel.bias, QUIET)
        self.phoneme_enter = nn.Linear(DIMENSIONS, width)
        self.phoneme_blocks = nn.ModuleList(ConvBlock(width, 5) for _ in range(2))
        self.phonemes = nn.Linear(width, phonemes)

    def forward(self, codes: Tensor, mask: Tensor, speaker: Tensor) -> tuple[Tensor, Tensor]:
        """codes [b, n, 8] -> mel [b, 2n, mel], log-probabilities of phonemes [b, n, phonemes]."""
        x = self.enter(codes) + self.speaker(speaker)[:, None]
        for block in self.mel_blocks:
            x = block(x, mask)
        b, n, _ = x.shape
        y = self.phoneme_enter(codes)
        for block in self.phoneme_blocks:
            y = block(y, mask)
        return self.mel(x).view(b, 2 * n, -1), self.phonemes(y).float().log_softmax(-1)
