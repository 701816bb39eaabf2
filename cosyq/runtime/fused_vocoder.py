"""The vocoder for a GPU: the reference's samples from some sixty kernels a chunk, recorded once as a graph.

Weights and activations are float16, sums float32; pitch, phase and transforms are in the reference's precision. A chunk
has at most CHUNK frames, whatever is asked for, so memory is the same for every utterance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosyq.kernels.excitation import excite, pitch_conv, transform
from cosyq.kernels.streaming import Extent, Rows
from cosyq.kernels.vocoder import Activation, Conv, conv, mix, overlap_add
from cosyq.model.vocoder import MAX_MAGNITUDE, NOISE_FRAMES, StreamState, Vocoder, excitation_noise
from cosyq.runtime.recording import recorded
from cosyq.runtime.vocoder_buffers import Buffers, Tails, split
from cosyq.runtime.vocoder_weights import Pair, Stage, pack

CHUNK = 100  # frames: the reference's, too
KEPT_NOISE = 60  # blocks of noise that stay on the device, 96 KB each
POST_SLOPE = 0.01  # of the leaky ReLU in front of the last convolution, torch's own


class FusedVocoder:
    """`Vocoder.render` for one utterance at a time; the reference vocoder that it is made from may go.

    Buffers belong to this object and a stream's tails are copied in and out of them, so one thread may render, and any
    number of utterances by turns.

    Args:
        dtype: of the convolutions' weights and activations.
        chunk: the most frames at a time; buffers are as long.

    Raises:
        DeviceError: the weights do not fit `dtype`, or the dimensions are none that the kernels know.
    """

    def __init__(self, vocoder: Vocoder, dtype: torch.dtype = torch.float16, chunk: int = CHUNK):
        self.config, self.lookahead, self.chunk = vocoder.config, vocoder.lookahead, chunk
        self.device = vocoder.conv_pre.weight.device
        self._weights = pack(vocoder, dtype)
        self._noise = MergedNoise(vocoder, chunk)
        self._tails = Tails(self._weights)
        self._buffers = Buffers(self._weights, chunk, self.lookahead)
        self._graph = self._record() if self.device.type == "cuda" else None

    @torch.inference_mode()
    def render(self, mel: Tensor, state: StreamState, *, final: bool, noise: Tensor | None = None) -> Tensor:
        """As `Vocoder.render`, batch 1: mel [1, mel, t] float32 -> samples [1, n] float32."""
        mel, count = state.admit(mel, self.lookahead, final)
        parts = [mel.new_zeros(0)]
        for begin in range(0, count, self.chunk):
            frames = min(self.chunk, count - begin)
            window = mel[0, :, begin : begin + frames + self.lookahead]
            parts.append(self._chunk(window, frames, state, final and begin + frames == count, noise))
        return torch.cat(parts).unsqueeze(0)

    def _chunk(self, window: Tensor, frames: int, state: StreamState, final: bool, noise: Tensor | None) -> Tensor:
        c, first = self.config, state.frames_out == 0
        offset = self._noise.place(state.frames_out, frames + (not final), noise)
        counts = torch.tensor([frames, first, final, offset], dtype=torch.int32)
        self._buffers.counts.copy_(counts, non_blocking=True)
        self._buffers.mel[: window.shape[1], : c.mel_dim] = window.T
        self._tails.load(state.take("fused"))
        if self._graph is None:
            self._launch()
        else:
            self._graph.replay()
        state.put("fused", self._tails.after)
        state.frames_out += frames
        half = c.n_fft // (2 * c.hop)  # hops of a window's first half: padding in front, and one less behind
        hops = frames * c.stft_per_frame + first
        return self._buffers.wav[half if first else 0 : hops + (half - 1 if final else 0)].flatten().clone()

    def _record(self) -> torch.cuda.CUDAGraph:
        """Record the kernels, which compiles or loads them."""
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            with torch.cuda.stream(torch.cuda.Stream()):
                return recorded(self._launch)

    def _launch(self) -> None:
        """One chunk, from `counts`, `mel`, the noise and the tails before to `wav` and the tails after."""
        c, w, b = self.config, self._weights, self._buffers
        slope, frames = c.lrelu_slope, Extent(self.chunk, 1)
        spectrum = self._excitation()
        low = Activation(self._rows("low0", split(b.low, 1, w.pre.outputs)), w.stages[0].up.taps, slope=slope)
        ahead = b.mel[w.pre.taps[0] - 1 :]  # a causal convolution's row 0 is its last tap's
        conv(ahead, w.pre, b.counts, rows=frames, act=low)
        for i, stage in enumerate(w.stages):
            last = i == len(w.stages) - 1
            rows = Extent(self.chunk, stage.rate, extra=last)
            taps = w.post.taps if last else w.stages[i + 1].up.taps
            into = self._rows(f"low{i + 1}", split(b.x if last else b.low, 1, stage.down.outputs))
            act = Activation(into, taps, slope=POST_SLOPE if last else slope)
            self._stage(f"stage{i}", stage, low.into, frames, spectrum, rows, act)
            low, frames = act, rows
        head = Activation(self._rows("head", split(b.up, 1, w.post.outputs)), (c.n_fft // c.hop,), slope=1.0)
        conv(low.into, w.post, b.counts, rows=frames, act=head)
        overlap_add(head.into, w.inverse, b.counts, rows=frames, limit=c.audio_limit, most=MAX_MAGNITUDE, out=b.wav)

    def _excitation(self) -> Rows:
        """The spectrum of the excitation, from the pitch of the mel's frames."""
        c, w, b = self.config, self._weights, self._buffers
        x: Rows | Tensor = b.mel
        for i, layer in enumerate(w.pitch):
            into = self._rows(f"pitch{i}", b.hidden[i % 2])
            pitch_conv(x, layer, b.counts, rows=self.chunk + 1, past=w.pitch_pasts[i], into=into)
            x = into
        frames, spectrum = self._rows("frames", b.frames), self._rows("spectrum", b.spectrum)
        excite(into, w.source, b.counts, rows=self.chunk + 1, f0=b.f0, into=frames, phase=self._tails.views("phase"))
        transform(
            frames,
            self._noise.merged,
            w.basis,
            b.counts,
            rows=Extent(self.chunk, c.stft_per_frame, extra=True),
            hop=c.hop,
            past=w.spectrum_past,
            into=spectrum,
        )
        return spectrum

    def _stage(
        self, name: str, stage: Stage, low: Rows, frames: Extent, spectrum: Rows, rows: Extent, act: Activation
    ) -> None:
        """Upsample the rows of `low`, mix in the excitation, and leave act(mean of the residual blocks)."""
        b, channels = self._buffers, stage.down.outputs
        up, x = split(b.up, 1, channels), split(b.x, 1, channels)
        raw = split(b.raw, len(stage.blocks[0].first.taps), channels)
        conv(low, stage.up, b.counts, rows=frames, raw=up)
        into_source = self._entry(f"{name}.source", stage.source, 0)
        conv(spectrum, stage.down, b.counts, rows=rows, raw=x, act=into_source)
        into_blocks = self._entry(f"{name}.blocks", stage.blocks, 0)
        self._chain(f"{name}.source", stage.source, rows, x, x, act=into_blocks, other=up)
        self._chain(f"{name}.blocks", stage.blocks, rows, x, raw)
        mix(raw, b.counts, rows=rows, act=act)

    def _chain(
        self,
        name: str,
        pairs: tuple[Pair, ...],
        rows: Extent,
        residual: Tensor,
        raw: Tensor,
        *,
        act: Activation | None = None,
        other: Tensor | None = None,
    ) -> None:
        """Residual blocks side by side: raw = blocks(residual) (+ other), then `act` of it."""
        counts = self._buffers.counts
        for j, pair in enumerate(pairs):
            last = j == len(pairs) - 1
            inner = Activation(
                self._acts(f"{name}.{j}.second", 1, pair.second), pair.second.taps, alpha=pair.second_alpha
            )
            conv(
                self._acts(f"{name}.{j}.first", 0, pair.first),
                pair.first,
                counts,
                rows=rows,
                dilation=pair.dilation,
                act=inner,
            )
            conv(
                inner.into,
                pair.second,
                counts,
                rows=rows,
                residual=residual,
                other=other if last else None,
                raw=raw,
                act=act if last else self._entry(name, pairs, j + 1),
            )
            residual = raw

    def _entry(self, name: str, pairs: tuple[Pair, ...], j: int) -> Activation:
        pair = pairs[j]
        into = self._acts(f"{name}.{j}.first", 0, pair.first)
        return Activation(into, pair.first.taps, pair.dilation, alpha=pair.first_alpha)

    def _acts(self, name: str, side: int, layer: Conv) -> Rows:
        return self._rows(name, split(self._buffers.acts[side], len(layer.taps), layer.inputs))

    def _rows(self, name: str, data: Tensor) -> Rows:
        return Rows(data, *self._tails.views(name))


class MergedNoise:
    """The excitation's noise, merged over the harmonics as the source merges them: one number a sample.

    It depends on the position alone, so the first minute is kept on the device once it was drawn, 5.8 MB; what lies
    behind is drawn again for every chunk.
    """

    def __init__(self, vocoder: Vocoder, chunk: int):
        c = self._config = vocoder.config
        self._weight = vocoder.source.linear.weight[0].float().cpu()
        self._block = NOISE_FRAMES * c.samples_per_frame
        self._kept = 0  # blocks
        self._room = KEPT_NOISE * self._block
        size = self._room + (chunk + 2) * c.samples_per_frame
        self.merged = torch.zeros(size, device=vocoder.conv_pre.weight.device)

    def place(self, first: int, count: int, given: Tensor | None) -> int:
        """Where in `merged` the noise of frame `first` starts; that of the frame before and of `count` frames is there.

        `given` [samples, harmonics + 1] takes the place of the fixed noise.
        """
        size = self._config.samples_per_frame
        if given is None and first + count <= KEPT_NOISE * NOISE_FRAMES:
            for block in range(self._kept, -(-(first + count) // NOISE_FRAMES)):
                drawn = self._merge(self._drawn(block * NOISE_FRAMES, NOISE_FRAMES))
                self.merged[block * self._block : (block + 1) * self._block].copy_(drawn)
                self._kept = block + 1
            return first * size
        before = min(first, 1)
        begin, frames = first - before, count + before
        drawn = self._drawn(begin, frames) if given is None else given[begin * size : (begin + frames) * size]
        self.merged[self._room : self._room + len(drawn)].copy_(self._merge(drawn))
        return self._room + before * size

    def _drawn(self, first: int, count: int) -> Tensor:
        c = self._config
        return excitation_noise(first, count, c.harmonics + 1, c.samples_per_frame)

    def _merge(self, noise: Tensor) -> Tensor:
        return noise @ self._weight.to(noise.device)
