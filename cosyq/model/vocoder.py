"""Causal HiFT: mel frames to samples, in chunks that join without a seam.

A neural source filter (arXiv 1904.12088) excites an iSTFTNet (arXiv 2203.02395); HiFTNet (arXiv 2309.09493)
put them together and CosyVoice 3 made every convolution causal. What a chunk must know of the past is a
short tail of each layer's input, kept in a `StreamState`: each frame is rendered once, whatever the splits,
and an utterance's length costs no memory.

Only two layers look ahead, the first of the F0 predictor and the first of the generator; the frames they
still wait for stay in the state until more arrive or the end is declared.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyq.model.config import VocoderConfig

NOISE_SEED = 1986
NOISE_FRAMES = 50  # frames of excitation noise that one seed draws
SNAKE_EPS = 1e-9
MAX_MAGNITUDE = 1e2


class StreamState:
    """What one utterance carries from chunk to chunk. A fresh one starts an utterance."""

    def __init__(self) -> None:
        self._tails: dict[nn.Module | str, Tensor] = {}
        self.frames_in = 0  # mel frames received
        self.frames_out = 0  # mel frames rendered
        self.finished = False

    def join(self, key: nn.Module | str, x: Tensor, keep: int, zeros: int | None = None) -> Tensor:
        """Put the kept tail of `key` in front of x [..., t] and keep the last `keep` columns for next time.

        The first call of an utterance has no tail and puts `zeros` columns of zeros there, by default `keep`.
        """
        past = self._tails.get(key)
        if past is None:
            past = x.new_zeros(*x.shape[:-1], keep if zeros is None else zeros)
        joined = torch.cat([past, x], dim=-1)
        self.put(key, joined[..., joined.shape[-1] - keep :])
        return joined

    def admit(self, mel: Tensor, lookahead: int, final: bool) -> tuple[Tensor, int]:
        """Take in the next frames [b, mel, t]; returns those from `frames_out` on, and how many can be rendered now.

        `lookahead` frames follow the last of these, zeros after the end.
        """
        if self.finished:
            raise ValueError("this utterance was finished; start another with a fresh StreamState")
        self.finished = final
        self.frames_in += mel.shape[-1]
        held = self.take("mel")
        mel = mel if held is None else torch.cat([held, mel], dim=-1)
        if final:
            mel = F.pad(mel, (0, lookahead))
        count = max(self.frames_in - (0 if final else lookahead) - self.frames_out, 0)
        self.put("mel", mel[..., count:])
        return mel, count

    def take(self, key: str) -> Tensor | None:
        return self._tails.get(key)

    def put(self, key: nn.Module | str, value: Tensor) -> None:
        self._tails[key] = value.clone()  # a view would keep the whole chunk of every layer alive


class CausalConv(nn.Conv1d):
    """A convolution that sees only the past; its left padding is the stream's tail."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, dilation: int = 1):
        super().__init__(inputs, outputs, kernel, dilation=dilation)
        self.past = (kernel - 1) * dilation

    def run(self, x: Tensor, state: StreamState) -> Tensor:
        """x [b, inputs, t] -> [b, outputs, t]."""
        return self(state.join(self, x, self.past))


class StridedConv(nn.Conv1d):
    """Causal downsampling by a kernel of two strides.

    An STFT has one frame more than it has hops: with stride - 1 zeros in front, the first chunk gives one
    column per stride and leaves a whole stride of columns over, and so does every later one.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__(inputs, outputs, 2 * stride if stride > 1 else 1, stride=stride)

    def run(self, x: Tensor, state: StreamState) -> Tensor:
        """x [b, inputs, t] -> [b, outputs, t // stride]."""
        stride = self.stride[0]
        return self(state.join(self, x, keep=stride, zeros=stride - 1) if stride > 1 else x)


def snake(x: Tensor, alpha: Tensor) -> Tensor:
    """x + sin^2(alpha x) / alpha (arXiv 2006.08195); x [b, c, t], alpha [c]."""
    alpha = alpha[:, None]
    return x + torch.sin(x * alpha).square() / (alpha + SNAKE_EPS)


class Snake(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return snake(x, self.alpha)


class ResBlock(nn.Module):
    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]):
        super().__init__()
        self.convs1 = nn.ModuleList(CausalConv(channels, channels, kernel, dilation=d) for d in dilations)
        self.convs2 = nn.ModuleList(CausalConv(channels, channels, kernel) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def run(self, x: Tensor, state: StreamState) -> Tensor:
        for a1, c1, a2, c2 in zip(self.activations1, self.convs1, self.activations2, self.convs2, strict=True):
            x = x + c2.run(a2(c1.run(a1(x), state)), state)
        return x


def length_over_norm(length: Tensor, direction: Tensor) -> Tensor:
    """What a layer's weight is its direction times, for weight_g [outputs, 1, 1] and weight_v: [outputs] float64."""
    return length.double().flatten() / direction.flatten(1).double().norm(dim=1)


class PitchConv(nn.Module):
    """A float64 convolution whose weight norm is folded at each use, into its outputs.

    The product of direction and length has to be taken in float64 too: rounded to float32 once, it moves
    the pitch by 2e-8 and, by way of the phase, the waveform by 1e-4.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__()
        self.past = kernel - 1
        self.weight_g = nn.Parameter(torch.empty(outputs, 1, 1))
        self.weight_v = nn.Parameter(torch.empty(outputs, inputs, kernel))
        self.bias = nn.Parameter(torch.empty(outputs))

    @property
    def scale(self) -> Tensor:
        """Length over direction's norm, [outputs] float64."""
        return length_over_norm(self.weight_g, self.weight_v)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, inputs, t + past] -> [b, outputs, t], both float64."""
        return F.conv1d(x, self.weight_v.double()) * self.scale[:, None] + self.bias.double()[:, None]


class F0Predictor(nn.Module):
    """Mel to fundamental frequency in Hz, in float64.

    The pitch is summed up into a phase of thousands of radians, so a rounding that depends on how the
    utterance was split would be heard; in float64 it is gone after the cast to float32.
    """

    def __init__(self, config: VocoderConfig):
        super().__init__()
        first, *rest = config.f0_kernels
        convs = [PitchConv(config.mel_dim, config.f0_channels, first)]
        convs += [PitchConv(config.f0_channels, config.f0_channels, k) for k in rest]
        self.convs = nn.ModuleList(convs)
        self.classifier = nn.Linear(config.f0_channels, 1)
        self.lookahead = first - 1

    def run(self, mel: Tensor, state: StreamState) -> Tensor:
        """mel [b, mel, t + lookahead] -> f0 [b, t] float32: the first convolution looks ahead, unpadded."""
        first, *rest = self.convs
        x = F.elu(first(mel.double()))
        for conv in rest:
            x = F.elu(conv(state.join(conv, x, conv.past)))
        x = F.linear(x.transpose(1, 2), self.classifier.weight.double(), self.classifier.bias.double())
        return x.squeeze(-1).abs().float()


def excitation_noise(first: int, count: int, width: int, samples_per_frame: int) -> Tensor:
    """Uniform noise of frames first .. first + count, [count * samples_per_frame, width] float32 on the host.

    Indexed by position: seeded block by block, so a frame gets the same noise however it is reached,
    and no block of five minutes (260 MB, as in the original) is kept.
    """
    numbers = range(first // NOISE_FRAMES, (first + count - 1) // NOISE_FRAMES + 1)
    blocks = [_noise_block(number, width, NOISE_FRAMES * samples_per_frame) for number in numbers]
    offset = (first % NOISE_FRAMES) * samples_per_frame
    return torch.cat(blocks)[offset : offset + count * samples_per_frame]


@functools.lru_cache(maxsize=4)  # chunks that are shorter than a block, or begin inside one, share it
def _noise_block(number: int, width: int, samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(NOISE_SEED + number)
    return torch.rand(samples, width, generator=generator)


class HarmonicSource(nn.Module):
    """Fundamental frequency to excitation: sines where voiced, noise elsewhere, merged to one signal."""

    def __init__(self, config: VocoderConfig):
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.harmonics + 1, 1)

    def run(self, f0: Tensor, noise: Tensor, state: StreamState) -> Tensor:
        """f0 [b, t] float32, noise [t * samples_per_frame, harmonics + 1] in 0..1 -> source [b, t * samples_per_frame].

        The original interpolates the per-sample phase step down to frames and the summed phase up again by
        repetition: the phase moves once a frame. Its roundings to float32 are kept (the network was trained
        on them), with the sum itself in float64 so that it does not depend on the device or the splits.
        """
        c = self.config
        harmonics = torch.arange(1, c.harmonics + 2, device=f0.device, dtype=torch.float32)
        step = (f0[..., None] * harmonics / c.sample_rate) % 1  # [b, t, h] turns per sample
        carried = state.take("phase")
        total = step.double().cumsum(dim=1) + (0 if carried is None else carried)
        state.put("phase", total[:, -1:])
        phase = total.float() * 2 * torch.pi * c.samples_per_frame
        voiced = (f0 > c.voiced_threshold).float()[..., None]
        sines = (torch.sin(phase) * c.sine_amp * voiced).repeat_interleave(c.samples_per_frame, dim=1)
        amplitude = (voiced * c.noise_std + (1 - voiced) * c.sine_amp / 3).repeat_interleave(c.samples_per_frame, dim=1)
        return torch.tanh(F.linear(sines + amplitude * noise, self.linear.weight, self.linear.bias)).squeeze(-1)


class Vocoder(nn.Module):
    """Mel frames to samples. All arithmetic is float32 but the F0 predictor's."""

    def __init__(self, config: VocoderConfig):
        super().__init__()
        c = self.config = config
        self.f0_predictor = F0Predictor(c)
        self.source = HarmonicSource(c)
        self.conv_pre = CausalConv(c.mel_dim, c.base_channels, c.lookahead + 1)
        self.ups, self.source_downs = nn.ModuleList(), nn.ModuleList()
        self.source_resblocks, self.resblocks = nn.ModuleList(), nn.ModuleList()
        stride = c.stft_per_frame
        for i, (rate, kernel) in enumerate(zip(c.upsample_rates, c.upsample_kernels, strict=True)):
            inputs, outputs = c.base_channels >> i, c.base_channels >> (i + 1)
            stride //= rate
            self.ups.append(CausalConv(inputs, outputs, kernel))
            self.source_downs.append(StridedConv(c.n_fft + 2, outputs, stride))
            self.source_resblocks.append(ResBlock(outputs, c.source_kernels[i], c.source_dilations[i]))
            for k, dilations in zip(c.resblock_kernels, c.resblock_dilations, strict=True):
                self.resblocks.append(ResBlock(outputs, k, dilations))
        self.conv_post = CausalConv(outputs, c.n_fft + 2, 7)

    @property
    def lookahead(self) -> int:
        """Mel frames that must follow a frame before it can be rendered."""
        return max(self.conv_pre.past, self.f0_predictor.lookahead + 1)

    def render(self, mel: Tensor, state: StreamState, *, final: bool, noise: Tensor | None = None) -> Tensor:
        """Render as many new samples as the frames so far allow.

        Args:
            mel: the next frames, [b, mel, t] float32; t may be 0.
            state: this utterance's state, advanced in place.
            final: no frame will follow; everything held back is rendered.
            noise: excitation noise from the utterance's start, [samples, harmonics + 1], in place of the fixed one.

        Returns samples [b, n] float32. Over an utterance of T frames the calls sum up to T * samples_per_frame.
        """
        c = self.config
        mel, count = state.admit(mel, self.lookahead, final)
        if count == 0:
            return mel.new_zeros(mel.shape[0], 0)
        spectrum = self._source_spectrum(mel, count, state, noise, final)
        x = self.conv_pre(mel[..., : count + self.conv_pre.past])
        wav = self._overlap_add(self._generate(x, spectrum, state), state, final)
        state.frames_out += count
        return wav.clamp(-c.audio_limit, c.audio_limit)

    def _source_spectrum(
        self, mel: Tensor, count: int, state: StreamState, noise: Tensor | None, final: bool
    ) -> Tensor:
        """STFT of the excitation, real above imaginary, [b, n_fft + 2, count * stft_per_frame (+ 1 at the start)].

        A centred STFT frame reaches half a window into the future, so the excitation runs one mel frame
        ahead of the generator, until at the end it is reflected as `torch.stft` does.
        """
        c, half = self.config, self.config.n_fft // 2
        started = state.take("excitation") is not None
        first = state.frames_out + (1 if started else 0)
        last = state.frames_out + count + (0 if final else 1)
        begin = first - state.frames_out
        window = mel[..., begin : last - state.frames_out + self.f0_predictor.lookahead]
        if last > first:
            f0 = self.f0_predictor.run(window, state)
            if noise is None:
                drawn = excitation_noise(first, last - first, c.harmonics + 1, c.samples_per_frame)
            else:
                drawn = noise[first * c.samples_per_frame : last * c.samples_per_frame]
            signal = self.source.run(f0, drawn.to(f0.device), state)
        else:
            signal = mel.new_zeros(mel.shape[0], 0)
        past = state.take("excitation")
        signal = torch.cat([signal[:, 1 : half + 1].flip(-1), signal] if past is None else [past, signal], dim=-1)
        if final:
            signal = torch.cat([signal, signal[:, -half - 1 : -1].flip(-1)], dim=-1)
        frames = count * c.stft_per_frame + (0 if started else 1)
        used = frames * c.hop
        state.put("excitation", signal[:, used:])
        windows = signal[:, : used + c.n_fft - c.hop].unfold(-1, c.n_fft, c.hop)
        spectrum = torch.fft.rfft(windows * hann(c.n_fft, signal), dim=-1).transpose(1, 2)
        return torch.cat([spectrum.real, spectrum.imag], dim=1)

    def _generate(self, x: Tensor, spectrum: Tensor, state: StreamState) -> Tensor:
        """Upsample x [b, base, frames] and mix in the excitation; returns the output spectrum, like `spectrum`."""
        c, kernels = self.config, len(self.config.resblock_kernels)
        for i, up in enumerate(self.ups):
            x = F.leaky_relu(x, c.lrelu_slope).repeat_interleave(c.upsample_rates[i], dim=-1)
            x = up.run(x, state)
            if i == len(self.ups) - 1 and state.frames_out == 0:
                x = torch.cat([x[..., 1:2], x], dim=-1)  # reflected: the STFT has one frame more than hops
            x = x + self.source_resblocks[i].run(self.source_downs[i].run(spectrum, state), state)
            blocks = self.resblocks[i * kernels : (i + 1) * kernels]
            x = sum(block.run(x, state) for block in blocks) / kernels
        return self.conv_post.run(F.leaky_relu(x), state)

    def _overlap_add(self, x: Tensor, state: StreamState, final: bool) -> Tensor:
        """Inverse STFT of x [b, n_fft + 2, t] with the overlap carried on; returns samples [b, n]."""
        c, bins = self.config, self.config.n_fft // 2 + 1
        magnitude = x[:, :bins].exp().clamp(max=MAX_MAGNITUDE)
        angle = torch.sin(x[:, bins:])
        window = hann(c.n_fft, x)
        pieces = torch.fft.irfft(torch.polar(magnitude, angle).transpose(1, 2), n=c.n_fft, dim=-1) * window
        weights = window.square().expand_as(pieces)
        both = torch.stack([pieces, weights])  # numerator and window sum go through the same addition
        b, t = x.shape[0], x.shape[-1]
        length = (t - 1) * c.hop + c.n_fft
        folded = F.fold(
            both.reshape(2 * b, t, c.n_fft).transpose(1, 2), (1, length), kernel_size=(1, c.n_fft), stride=(1, c.hop)
        ).view(2, b, length)
        carried = state.take("overlap")
        if carried is not None:
            folded[..., : carried.shape[-1]] += carried
        done = t * c.hop
        state.put("overlap", folded[..., done:])
        if final:
            done += c.n_fft // 2 - c.hop  # centred: the second half of the last window is padding
        begin = c.n_fft // 2 if state.frames_out == 0 else 0
        return folded[0, :, begin:done] / folded[1, :, begin:done]


def hann(size: int, like: Tensor) -> Tensor:
    """Periodic Hann window, as scipy's `get_window("hann")` gives it."""
    return torch.hann_window(size, periodic=True, device=like.device, dtype=torch.float32)
