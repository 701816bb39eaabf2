"""Judges of the waveform, for training alone: spectra at three resolutions, and samples a period apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from training.mini.features import magnitude

RESOLUTIONS = ((2048, 480), (1024, 240), (512, 120))  # window, hop
PERIODS = (2, 3, 5, 7, 11)
Verdict = tuple[Tensor, list[Tensor]]  # score map, feature maps


def _conv(inputs: int, outputs: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1)) -> nn.Module:
    padding = (kernel[0] // 2, kernel[1] // 2)
    return weight_norm(nn.Conv2d(inputs, outputs, kernel, stride, padding))


class Judge(nn.Module):
    """A stack of convolutions over a picture of the sound, [b, 1, h, w]."""

    def __init__(self, layers: list[nn.Module], score: nn.Module):
        super().__init__()
        self.layers, self.score = nn.ModuleList(layers), score

    def forward(self, picture: Tensor) -> Verdict:
        features = []
        for layer in self.layers:
            picture = F.leaky_relu(layer(picture), 0.1)
            features.append(picture)
        return self.score(picture), features


class Judges(nn.Module):
    def __init__(self, width: int = 24):
        super().__init__()
        w = width
        self.spectral = nn.ModuleList(
            Judge(
                [_conv(1, w, (7, 5), (2, 1)), *(_conv(w, w, (5, 3), (2, 1)) for _ in range(3)), _conv(w, w, (3, 3))],
                _conv(w, 1, (3, 3)),
            )
            for _ in RESOLUTIONS
        )
        self.periodic = nn.ModuleList(
            Judge(
                [
                    _conv(1, w, (5, 1), (3, 1)),
                    _conv(w, 2 * w, (5, 1), (3, 1)),
                    _conv(2 * w, 4 * w, (5, 1), (3, 1)),
                    _conv(4 * w, 4 * w, (5, 1)),
                ],
                _conv(4 * w, 1, (3, 1)),
            )
            for _ in PERIODS
        )

    def forward(self, wave: Tensor) -> list[Verdict]:
        """wave [b, n] -> what each judge says."""
        verdicts = []
        for judge, (window, hop) in zip(self.spectral, RESOLUTIONS, strict=True):
            verdicts.append(judge(magnitude(wave, window, hop).clamp(min=1e-4).log()[:, None]))
        for judge, period in zip(self.periodic, PERIODS, strict=True):
            whole = wave.shape[1] // period * period
            verdicts.append(judge(wave[:, :whole].reshape(len(wave), 1, -1, period)))
        return verdicts


def judging_loss(real: list[Verdict], made: list[Verdict]) -> Tensor:
    """Least squares: real is one, made is zero."""
    return sum(  # type: ignore[return-value]
        (1 - r).square().mean() + m.square().mean() for (r, _), (m, _) in zip(real, made, strict=True)
    ) / len(real)


def deceiving_loss(real: list[Verdict], made: list[Verdict]) -> tuple[Tensor, Tensor]:
    """How far the made is from being taken for real, and how differently the judges see the two."""
    fooled = sum((1 - m).square().mean() for m, _ in made) / len(made)
    matched = [
        (r.detach() - m).abs().mean() / r.detach().abs().mean().clamp(min=1e-3)
        for (_, rs), (_, ms) in zip(real, made, strict=True)
        for r, m in zip(rs, ms, strict=True)
    ]
    return torch.as_tensor(fooled), torch.stack(matched).mean()
