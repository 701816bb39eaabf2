"""The memory of a fused vocoder: what its kernels read and write within a chunk, and what goes on to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from cosyq.kernels.streaming import COUNTS, MARGIN
from cosyq.runtime.vocoder_weights import Weights


class Buffers:
    """For chunks of at most `chunk` frames. The stages use `low` to `acts` one after the other, each in its shape."""

    def __init__(self, w: Weights, chunk: int, lookahead: int):
        dtype, device = w.pre.weight.dtype, w.pre.weight.device

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        frames, hops = MARGIN + chunk + 1, MARGIN + chunk * w.stages[-1].rate + 1
        largest = max((MARGIN + chunk * stage.rate + 1) * stage.down.outputs for stage in w.stages)
        blocks = len(w.stages[0].blocks[0].first.taps)
        self.counts = zeros(COUNTS, dtype=torch.int32)
        self.mel = zeros(chunk + lookahead, w.pre.inputs)
        self.hidden = zeros(2, 1, frames, w.pitch[0].weight.shape[2], dtype=torch.float64)  # of the pitch
        self.f0 = zeros(chunk + 1)
        self.frames = zeros(1, frames, 2)  # of the excitation
        self.spectrum = zeros(1, hops, w.basis.shape[1], dtype=dtype)
        self.low = zeros(max(largest, frames * w.pre.outputs), dtype=dtype)  # what the next stage upsamples
        self.up, self.x = zeros(2, max(largest, hops * w.post.outputs))  # at last the output layer's, out and in
        self.raw = zeros(blocks * largest)
        self.acts = zeros(2, blocks * largest, dtype=dtype)  # activations in front of first and second convolutions
        self.wav = zeros(hops, w.inverse.hop)


def split(memory: Tensor, groups: int, channels: int) -> Tensor:
    """[groups, as many rows as there is room for, channels]."""
    rows = memory.numel() // (groups * channels)
    return memory[: groups * rows * channels].view(groups, rows, channels)


class Tails:
    """What buffers hand from chunk to chunk, all in one piece: the bytes `before` a chunk, and those `after` it."""

    def __init__(self, w: Weights):
        self._places: dict[str, tuple[slice, torch.dtype]] = {}
        end = 0
        for name, (count, dtype) in _sizes(w).items():
            begin, end = end, end + count * dtype.itemsize
            self._places[name] = slice(begin, end), dtype
            end += -end % 16
        self.before = torch.zeros(end, dtype=torch.uint8, device=w.pre.weight.device)
        self.after = torch.zeros_like(self.before)

    def views(self, name: str) -> tuple[Tensor, Tensor]:
        place, dtype = self._places[name]
        return self.before[place].view(dtype), self.after[place].view(dtype)

    def load(self, kept: Tensor | None) -> None:
        """An utterance starts with zeros."""
        if kept is None:
            self.before.zero_()
        else:
            self.before.copy_(kept)


def _sizes(w: Weights) -> dict[str, tuple[int, torch.dtype]]:
    """How many numbers of each buffer the next chunk needs; the names are those that `FusedVocoder` launches with."""
    dtype = w.pre.weight.dtype
    readers = [stage.up for stage in w.stages] + [w.post]
    sizes = {f"low{i}": ((r.taps[0] - 1) * r.inputs, r.weight.dtype) for i, r in enumerate(readers)}
    for i, stage in enumerate(w.stages):
        for kind, pairs in (("source", stage.source), ("blocks", stage.blocks)):
            for j, pair in enumerate(pairs):
                past = (sum(pair.first.taps) - len(pair.first.taps)) * pair.first.inputs
                sizes[f"stage{i}.{kind}.{j}.first"] = past * pair.dilation, dtype
                sizes[f"stage{i}.{kind}.{j}.second"] = past, dtype
    for i, past in enumerate(w.pitch_pasts):
        sizes[f"pitch{i}"] = past * w.pitch[i].weight.shape[2], torch.float64
    sizes["phase"] = w.source.merge.shape[0], torch.float64
    sizes["frames"] = 2 * 2, torch.float32  # the one before, and the one that the excitation is ahead
    sizes["spectrum"] = w.spectrum_past * w.basis.shape[1], dtype
    sizes["head"] = (w.inverse.real.shape[0] - 1) * w.post.outputs, torch.float32
    return sizes
