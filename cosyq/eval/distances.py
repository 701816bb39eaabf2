"""How far apart two outputs of a network are: pure functions of tensors.

The differences are taken in float64, so that what is equal is at a distance of exactly zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DECIBELS = 20 / math.log(10)  # of a natural logarithm of a magnitude
CEPSTRA = 13  # coefficients, without the zeroth, which is loudness
# FFT size, hop and window of Parallel WaveGAN's three resolutions, which are for 24 kHz.
RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
POWER_FLOOR = 1e-7  # of a bin of the STFT: Parallel WaveGAN's best-known code has it


def outcomes(logits: Tensor, speech_vocab: int, minimum: int) -> Tensor:
    """What may happen next at every step: one of the speech ids, or the end, which all ids above them mean alike.

    Args:
        logits: [steps, speech_rows].
        minimum: the first step that may end, as in sampling.

    Returns log-probabilities [steps, speech_vocab + 1] float64, the end last, -inf before `minimum`.
    """
    logits = logits.double()
    ending = logits[:, speech_vocab:].logsumexp(-1, keepdim=True)
    ending[:minimum] = -torch.inf
    return torch.cat([logits[:, :speech_vocab], ending], dim=-1).log_softmax(-1)


def divergence(reference: Tensor, found: Tensor) -> Tensor:
    """Kullback and Leibler's (1951) of `found` from `reference`, both `outcomes`: [steps] nats."""
    terms = reference.exp() * (reference - found)
    return terms.masked_fill(reference == -torch.inf, 0).sum(-1)


def agreement(reference: Tensor, found: Tensor) -> Tensor:
    """Whether the likeliest outcome is the same one: [steps] bool."""
    return reference.argmax(-1) == found.argmax(-1)


def surprise(found: Tensor, happened: Tensor) -> Tensor:
    """Negative log-likelihood of what happened, [steps] int64, under `outcomes`: [steps] nats."""
    return -found.gather(-1, happened[:, None])[:, 0]


def log_spectral(reference: Tensor, found: Tensor) -> Tensor:
    """Log-spectral distance (Gray and Markel, 1976) over mel bins: RMS of the levels' difference, [frames] dB.

    Both [mel, frames], natural logarithms of magnitudes.
    """
    return (found.double() - reference.double()).square().mean(0).sqrt() * DECIBELS


def mel_cepstral(reference: Tensor, found: Tensor) -> Tensor:
    """Mel-cepstral distance (Kubichek, 1993) of coefficients 1 to 13: [frames] dB.

    Arguments as in `log_spectral`, and on its scale: a cepstrum is the cosine series of the log mel, so this is the
    log-spectral distance of the two envelopes, loudness left out.
    """
    bins = reference.shape[0]
    angles = torch.arange(1, CEPSTRA + 1)[:, None] * (torch.arange(bins) + 0.5) * (torch.pi / bins)
    series = (2 / bins) * angles.double().cos().to(reference.device)
    coefficients = series @ (found.double() - reference.double())
    return (coefficients.square().sum(0) / 2).sqrt() * DECIBELS


def stft_distance(reference: Tensor, found: Tensor) -> float:
    """Multi-resolution STFT distance (Yamamoto, Song and Kim, Parallel WaveGAN, 2020) of samples, both [n] at 24 kHz.

    Spectral convergence and mean difference of log magnitudes, added, and averaged over three resolutions. The ends are
    padded with zeros, so that the shortest sound has one.
    """
    total = 0.0
    for fft, hop, length in RESOLUTIONS:
        one, other = (_magnitude(samples.double(), fft, hop, length) for samples in (reference, found))
        convergence = (one - other).norm() / one.norm()
        total += float(convergence + (one.log() - other.log()).abs().mean())
    return total / len(RESOLUTIONS)


def _magnitude(samples: Tensor, fft: int, hop: int, length: int) -> Tensor:
    window = torch.hann_window(length, dtype=samples.dtype, device=samples.device)
    spectrum = torch.stft(samples, fft, hop, length, window, pad_mode="constant", return_complex=True)
    return torch.view_as_real(spectrum).square().sum(-1).clamp(min=POWER_FLOOR).sqrt()
