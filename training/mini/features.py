"""The three spectral features of CosyVoice 3, batched, on any device, differentiable."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from training.mini.config import MEL_BINS, MEL_HOP, SAMPLE_RATE

MEL_WINDOW = 1920
WHISPER_RATE, WHISPER_WINDOW, WHISPER_HOP, WHISPER_BINS = 16_000, 400, 160, 128
RESAMPLER_TAPS = 96  # per output phase


@cache
def slaney_filters(rate: int, n_fft: int, bins: int, device: torch.device) -> Tensor:
    """Triangles of equal area on Slaney's mel scale, linear to 1 kHz and logarithmic above: [bins, n_fft/2 + 1]."""
    knee, per_mel = 1000.0, 200.0 / 3
    log_step = torch.log(torch.tensor(6.4)).double() / 27

    def to_mel(hz: Tensor) -> Tensor:
        above = knee / per_mel + torch.log(hz.clamp(min=1e-9) / knee) / log_step
        return torch.where(hz < knee, hz / per_mel, above)

    def to_hz(mel: Tensor) -> Tensor:
        return torch.where(mel < knee / per_mel, mel * per_mel, knee * torch.exp(log_step * (mel - knee / per_mel)))

    ends = to_mel(torch.tensor([0.0, rate / 2], dtype=torch.float64))
    corners = to_hz(torch.linspace(float(ends[0]), float(ends[1]), bins + 2, dtype=torch.float64))
    hz = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    rising = (hz - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - hz) / (corners[2:] - corners[1:-1])[:, None]
    area = 2.0 / (corners[2:] - corners[:-2])
    return (torch.minimum(rising, falling).clamp(min=0) * area[:, None]).float().to(device)


def magnitude(wave: Tensor, window: int, hop: int) -> Tensor:
    """|STFT| of wave [b, n], uncentred, Hann: [b, window/2 + 1, frames]."""
    hann = torch.hann_window(window, device=wave.device)
    spectrum = torch.stft(wave, window, hop, window=hann, center=False, return_complex=True)
    return torch.sqrt(spectrum.real.square() + spectrum.imag.square() + 1e-9)


def acoustic_mel(wave: Tensor) -> Tensor:
    """What the flow makes and the vocoder reads: wave [b, n] at 24 kHz -> log mel [b, 80, n // 480]."""
    edge = (MEL_WINDOW - MEL_HOP) // 2
    padded = F.pad(wave[:, None], (edge, edge), mode="reflect")[:, 0]
    filters = slaney_filters(SAMPLE_RATE, MEL_WINDOW, MEL_BINS, wave.device)
    return (filters @ magnitude(padded, MEL_WINDOW, MEL_HOP)).clamp(min=1e-5).log()


def whisper_mel(wave: Tensor) -> Tensor:
    """What the speech tokenizer hears: wave [b, n] at 16 kHz -> [b, 128, n // 160], Whisper's scaling."""
    hann = torch.hann_window(WHISPER_WINDOW, device=wave.device)
    spectrum = torch.stft(wave, WHISPER_WINDOW, WHISPER_HOP, window=hann, return_complex=True)
    filters = slaney_filters(WHISPER_RATE, WHISPER_WINDOW, WHISPER_BINS, wave.device)
    logs = (filters @ spectrum[..., :-1].abs().square()).clamp(min=1e-10).log10()
    logs = torch.maximum(logs, logs.amax(dim=(1, 2), keepdim=True) - 8.0)
    return (logs + 4.0) / 4.0


@cache
def _kaldi_filters() -> Tensor:
    """Triangles on 1127 ln(1 + f/700) from 20 Hz to 8 kHz over a 512-point spectrum: [80, 257]."""
    mel = 1127.0 * torch.log1p(torch.arange(257, dtype=torch.float64) * (WHISPER_RATE / 512) / 700.0)
    ends = 1127.0 * torch.log1p(torch.tensor([20.0, WHISPER_RATE / 2], dtype=torch.float64) / 700.0)
    corners = torch.linspace(float(ends[0]), float(ends[1]), MEL_BINS + 2, dtype=torch.float64)
    rising = (mel - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - mel) / (corners[2:] - corners[1:-1])[:, None]
    filters = torch.minimum(rising, falling).clamp(min=0)
    filters[:, 256] = 0  # Kaldi leaves the Nyquist bin out
    return filters.float()


def speaker_fbank(wave: Tensor) -> Tensor:
    """What the speaker encoder hears: wave [b, n] at 16 kHz -> Kaldi's log fbank less its mean, [b, frames, 80]."""
    frames = wave.unfold(-1, 400, 160)
    frames = frames - frames.mean(-1, keepdim=True)
    frames = frames - 0.97 * torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    window = torch.hann_window(400, periodic=False, device=wave.device).pow(0.85)
    power = torch.fft.rfft(frames * window, n=512).abs().square()
    logs = (power @ _kaldi_filters().to(wave.device).T).clamp(min=torch.finfo(torch.float32).eps).log()
    return logs - logs.mean(dim=-2, keepdim=True)


@cache
def _two_thirds() -> Tensor:
    """Windowed sinc, two output phases a stride of three inputs: [2, 1, taps]."""
    offsets = torch.arange(RESAMPLER_TAPS, dtype=torch.float64) - RESAMPLER_TAPS // 2
    kernels = []
    for phase in (0.0, 1.5):
        x = offsets - phase
        taper = torch.cos(torch.pi * x / (RESAMPLER_TAPS + 4)).clamp(min=0).square()
        kernel = torch.sinc(x * 0.65) * taper
        kernels.append(kernel / kernel.sum())
    return torch.stack(kernels)[:, None].float()


def to_16k(wave: Tensor) -> Tensor:
    """wave [b, n] at 24 kHz, n a multiple of 3 -> [b, 2n/3] at 16 kHz."""
    padded = F.pad(wave[:, None], (RESAMPLER_TAPS // 2, RESAMPLER_TAPS // 2))
    phases = F.conv1d(padded, _two_thirds().to(wave.device), stride=3)
    return phases.transpose(1, 2).flatten(1)[:, : wave.shape[1] * 2 // 3]
