"""The three spectral features of the model, as the libraries that define them compute them.

- the flow's mel: Matcha-TTS and HiFi-GAN's, 24 kHz, 50 frames a second, natural log of magnitude;
- the speech tokenizer's: Whisper's log-mel, 128 bins, 16 kHz, 100 frames a second;
- the speaker encoder's: Kaldi's fbank, 80 bins, 16 kHz, 100 frames a second, mean subtracted.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MEL_RATE, SPEECH_RATE = 24_000, 16_000
MEL_FFT, MEL_HOP, MEL_BINS = 1920, 480, 80
WHISPER_FFT, WHISPER_HOP, WHISPER_BINS = 400, 160, 128
WHISPER_RANGE = 8.0  # decades below the loudest that are kept


@cache
def slaney_filters(rate: int, fft: int, bins: int) -> Tensor:
    """Triangular filters on Slaney's mel scale, each of unit area, [bins, fft // 2 + 1] float32.

    The scale of the Auditory Toolbox (Slaney 1998): linear up to 1 kHz, logarithmic above.
    """
    step = math.log(6.4) / 27

    def to_hertz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(step * (mel - 15)))

    top = 15 + math.log(rate / 2 / 1000) / step
    edges = to_hertz(np.linspace(0, top, bins + 2))
    centres = np.linspace(0, rate / 2, fft // 2 + 1)
    slopes = edges[:, None] - centres[None, :]
    width = np.diff(edges)
    rising, falling = -slopes[:-2] / width[:-1, None], slopes[2:] / width[1:, None]
    filters = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return torch.from_numpy(filters).float()


def flow_mel(samples: Tensor) -> Tensor:
    """samples [n] float32 at 24 kHz -> [n // 480, 80] float32, natural log, floored at 1e-5."""
    margin = (MEL_FFT - MEL_HOP) // 2
    padded = F.pad(samples[None, None], (margin, margin), mode="reflect")[0, 0]
    spectrum = torch.stft(
        padded, MEL_FFT, MEL_HOP, window=torch.hann_window(MEL_FFT), center=False, return_complex=True
    )
    magnitude = torch.sqrt(torch.view_as_real(spectrum).square().sum(-1) + 1e-9)
    return (slaney_filters(MEL_RATE, MEL_FFT, MEL_BINS) @ magnitude).clamp(min=1e-5).log().T


def whisper_log_mel(samples: Tensor) -> Tensor:
    """samples [n] float32 at 16 kHz -> [128, n // 160] float32 around 0..1 (Whisper, arXiv 2212.04356)."""
    spectrum = torch.stft(samples, WHISPER_FFT, WHISPER_HOP, window=torch.hann_window(WHISPER_FFT), return_complex=True)
    power = spectrum[:, :-1].abs().square()
    decades = (slaney_filters(SPEECH_RATE, WHISPER_FFT, WHISPER_BINS) @ power).clamp(min=1e-10).log10()
    return (torch.maximum(decades, decades.max() - WHISPER_RANGE) + 4) / 4


def kaldi_fbank(samples: Tensor) -> Tensor:
    """samples [n] float32 at 16 kHz -> [frames, 80] float32, each bin's mean subtracted; no dither."""
    import kaldi_native_fbank

    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0
    options.frame_opts.samp_freq = SPEECH_RATE
    options.mel_opts.num_bins = 80
    fbank = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(SPEECH_RATE, samples.numpy())  # in -1..1, as the original feeds it
    fbank.input_finished()
    frames = torch.from_numpy(np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)]))
    return frames - frames.mean(dim=0)
