"""Causal HiFT over whole utterances, differentiable, with weight norm: what the streaming vocoder computes."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from cosyq.model.config import VocoderConfig
from cosyq.model.vocoder import MAX_MAGNITUDE, hann, snake

QUIET = -4.0  # log magnitude that an untrained network makes, about a whisper


class CausalConv(nn.Conv1d):
    """Padded with zeros on the left, or on the right where it looks ahead."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, dilation: int = 1, ahead: bool = False):
        super().__init__(inputs, outputs, kernel, dilation=dilation)
        past = (kernel - 1) * dilation
        self.pads = (0, past) if ahead else (past, 0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.pads))


class StridedConv(nn.Conv1d):
    """Causal downsampling of an STFT, which has one frame more than hops."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__(inputs, outputs, 2 * stride if stride > 1 else 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.stride[0] - 1, 0)))


class Snake(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return snake(x, self.alpha)


class ResBlock(nn.Module):
    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]):
        super().__init__()
        self.convs1 = nn.ModuleList(_normed(CausalConv(channels, channels, kernel, dilation=d)) for d in dilations)
        self.convs2 = nn.ModuleList(_normed(CausalConv(channels, channels, kernel)) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for a1, c1, a2, c2 in zip(self.activations1, self.convs1, self.activations2, self.convs2, strict=True):
            x = x + c2(a2(c1(a1(x))))
        return x


def _normed(conv: nn.Conv1d) -> nn.Module:
    """Small weights under weight norm: a residual network that begins near the identity."""
    nn.init.normal_(conv.weight, std=0.02)
    return weight_norm(conv)


class F0Predictor(nn.Module):
    def __init__(self, c: VocoderConfig):
        super().__init__()
        layers: list[nn.Module] = []
        for index, kernel in enumerate(c.f0_kernels):
            inputs = c.f0_channels if index else c.mel_dim
            layers += [weight_norm(CausalConv(inputs, c.f0_channels, kernel, ahead=index == 0)), nn.ELU()]
        self.condnet = nn.Sequential(*layers)
        self.classifier = nn.Linear(c.f0_channels, 1)
        nn.init.normal_(self.classifier.weight, std=3.0)  # its output is in Hz, hundreds of them

    def forward(self, mel: Tensor) -> Tensor:
        """mel [b, mel, t] -> f0 [b, t] in Hz."""
        return self.classifier(self.condnet(mel).transpose(1, 2)).squeeze(-1).abs()


class Source(nn.Module):
    def __init__(self, c: VocoderConfig):
        super().__init__()
        self.c = c
        self.l_linear = nn.Linear(c.harmonics + 1, 1)

    def forward(self, f0: Tensor, noise: Tensor) -> Tensor:
        """f0 [b, t], noise [b, t * samples_per_frame, harmonics + 1] in 0..1 -> [b, t * samples_per_frame]."""
        c = self.c
        harmonics = torch.arange(1, c.harmonics + 2, device=f0.device, dtype=torch.float32)
        step = (f0[..., None] * harmonics / c.sample_rate) % 1
        phase = step.double().cumsum(dim=1).float() * 2 * torch.pi * c.samples_per_frame
        voiced = (f0 > c.voiced_threshold).float()[..., None]
        sines = torch.sin(phase) * c.sine_amp * voiced
        amplitude = voiced * c.noise_std + (1 - voiced) * c.sine_amp / 3
        sines, amplitude = (x.repeat_interleave(c.samples_per_frame, dim=1) for x in (sines, amplitude))
        return torch.tanh(self.l_linear(sines + amplitude * noise)).squeeze(-1)


class HiFT(nn.Module):
    """state_dict() has the names of hift.pt."""

    def __init__(self, c: VocoderConfig):
        super().__init__()
        self.c = c
        self.m_source = Source(c)
        self.conv_pre = weight_norm(CausalConv(c.mel_dim, c.base_channels, c.lookahead + 1, ahead=True))
        self.ups, self.source_downs = nn.ModuleList(), nn.ModuleList()
        self.source_resblocks, self.resblocks = nn.ModuleList(), nn.ModuleList()
        stride = c.stft_per_frame
        for i, (rate, kernel) in enumerate(zip(c.upsample_rates, c.upsample_kernels, strict=True)):
            inputs, outputs = c.base_channels >> i, c.base_channels >> (i + 1)
            stride //= rate
            self.ups.append(weight_norm(CausalConv(inputs, outputs, kernel)))
            self.source_downs.append(StridedConv(c.n_fft + 2, outputs, stride))
            self.source_resblocks.append(ResBlock(outputs, c.source_kernels[i], c.source_dilations[i]))
            for k, dilations in zip(c.resblock_kernels, c.resblock_dilations, strict=True):
                self.resblocks.append(ResBlock(outputs, k, dilations))
        post = CausalConv(outputs, c.n_fft + 2, 7)
        nn.init.constant_(post.bias[: c.n_fft // 2 + 1], QUIET)
        self.conv_post = weight_norm(post)
        self.f0_predictor = F0Predictor(c)

    def compile_blocks(self) -> None:
        """Fuse the residual blocks' many small steps; takes a minute of a GPU slice and pays for itself in two."""
        blocks = [*self.resblocks, *self.source_resblocks]
        torch._dynamo.config.recompile_limit = 2 * len(blocks) + 8  # one class, as many shapes as blocks
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
        for block in blocks:
            block.compile(dynamic=False)

    def forward(self, mel: Tensor, f0: Tensor, noise: Tensor) -> Tensor:
        """mel [b, mel, t], f0 [b, t] in Hz, uniform noise [b, t * 480, harmonics + 1] -> samples [b, t * 480]."""
        c, kernels = self.c, len(self.c.resblock_kernels)
        spectrum = self._stft(self.m_source(f0, noise))
        x = self.conv_pre(mel)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, c.lrelu_slope).repeat_interleave(c.upsample_rates[i], dim=-1))
            if i == len(self.ups) - 1:
                x = F.pad(x, (1, 0), mode="reflect")
            x = x + self.source_resblocks[i](self.source_downs[i](spectrum))
            x = sum(block(x) for block in self.resblocks[i * kernels : (i + 1) * kernels]) / kernels
        x = self.conv_post(F.leaky_relu(x)).float()
        return self._istft(x).clamp(-c.audio_limit, c.audio_limit)

    def _stft(self, source: Tensor) -> Tensor:
        """source [b, n] -> real above imaginary, [b, n_fft + 2, n / hop + 1]."""
        c = self.c
        spectrum = torch.stft(source, c.n_fft, c.hop, window=hann(c.n_fft, source), return_complex=True)
        return torch.cat([spectrum.real, spectrum.imag], dim=1)

    def _istft(self, x: Tensor) -> Tensor:
        """torch.istft as one transposed convolution: it looks at values on the host, which a CUDA graph cannot."""
        c, bins = self.c, self.c.n_fft // 2 + 1
        magnitude = x[:, :bins].exp().clamp(max=MAX_MAGNITUDE)
        phase = torch.sin(x[:, bins:])
        window = hann(c.n_fft, x)
        spectrum = torch.cat([magnitude * phase.cos(), magnitude * phase.sin()], dim=1)
        wave = F.conv_transpose1d(spectrum, (inverse_dft(c.n_fft, x.device) * window)[:, None], stride=c.hop)
        weight = F.conv_transpose1d(torch.ones_like(x[:1, :1]), window.square()[None, None], stride=c.hop)
        inside = slice(c.n_fft // 2, wave.shape[-1] - c.n_fft // 2)
        return wave[:, 0, inside] / weight[:, 0, inside]


@cache
def inverse_dft(n_fft: int, device: torch.device) -> Tensor:
    """What every real part, then every imaginary part, of a spectrum's half adds to the samples: [n_fft + 2, n_fft]."""
    turns = torch.outer(torch.arange(n_fft // 2 + 1), torch.arange(n_fft)).double() / n_fft * 2 * torch.pi
    share = torch.full((n_fft // 2 + 1, 1), 2.0 / n_fft, dtype=torch.float64)
    share[0] = share[-1] = 1.0 / n_fft
    return torch.cat([share * turns.cos(), -share * turns.sin()]).float().to(device)
