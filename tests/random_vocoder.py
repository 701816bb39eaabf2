"""A vocoder of random weights, scaled as in `cosyq.random_model`, made where it is used: no artifact, no file."""

from __future__ import annotations

import dataclasses
import math

import torch

from cosyq.model.config import VocoderConfig
from cosyq.model.vocoder import Vocoder

FULL = VocoderConfig(
    mel_dim=80,
    base_channels=512,
    harmonics=8,
    sample_rate=24000,
    sine_amp=0.1,
    noise_std=0.003,
    voiced_threshold=10.0,
    upsample_rates=(8, 5, 3),
    upsample_kernels=(16, 11, 7),
    n_fft=16,
    hop=4,
    resblock_kernels=(3, 7, 11),
    resblock_dilations=((1, 3, 5),) * 3,
    source_kernels=(7, 7, 11),
    source_dilations=((1, 3, 5),) * 3,
    lrelu_slope=0.1,
    audio_limit=0.99,
    lookahead=4,
    f0_channels=512,
    f0_kernels=(4, 3, 3, 3, 3),
)
# The same kind of network with everything smaller and nothing equal: 24 samples a frame.
SMALL = dataclasses.replace(
    FULL,
    mel_dim=20,
    base_channels=56,
    harmonics=2,
    upsample_rates=(3, 2),
    upsample_kernels=(7, 4),
    resblock_kernels=(3, 5),
    resblock_dilations=((1, 3),) * 2,
    source_kernels=(5, 3),
    source_dilations=((1, 2), (2,)),
    f0_channels=24,
    f0_kernels=(4, 3, 2),
)


def random_vocoder(config: VocoderConfig, *, seed: int = 0, device: str = "cpu") -> Vocoder:
    with torch.device(device):
        vocoder = Vocoder(config)
    generator = torch.Generator(device).manual_seed(seed)
    for name, value in vocoder.named_parameters():
        if name.endswith("alpha"):
            value.data.uniform_(0.5, 2.0, generator=generator)
        elif name.endswith("classifier.bias"):
            value.data.fill_(120.0)  # Hz
        elif name.endswith("conv_post.bias"):
            value.data.fill_(-3.0)  # log magnitude
        else:
            fan_in = math.prod(value.shape[1:]) if value.dim() > 1 else 100
            value.data.normal_(0.0, 0.7 / math.sqrt(fan_in), generator=generator)
    for conv in vocoder.f0_predictor.convs:
        conv.weight_g.data = conv.weight_v.data.norm(dim=(1, 2), keepdim=True)
    return vocoder.requires_grad_(False).eval()
