"""The data on the device: utterances by number, fetched in padded batches or as crops."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.mini.config import MEL_BINS, MEL_HOP, SAMPLES_PER_TOKEN, Folders

FRAMES_PER_TOKEN = SAMPLES_PER_TOKEN // MEL_HOP


class Corpus:
    """Utterance u is samples begin[u] .. begin[u] + length[u]; frames and tokens lie alike, a multiple coarser.

    Nothing but lengths, speakers and texts is read before it is asked for: a corpus of ids has no more than them.
    """

    def __init__(self, folders: Folders, device: torch.device):
        self.folders, self.device = folders, device
        index = self._index = np.load(folders.index)
        self.lengths: NDArray[np.int64] = index["lengths"]
        self.begins = np.concatenate([[0], self.lengths.cumsum()[:-1]])
        self.speakers: NDArray[np.int64] = index["speakers"]
        self.texts = [str(text) for text in index["texts"]]

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def waves(self) -> Tensor:
        """[samples] int16"""
        return torch.from_numpy(np.fromfile(self.folders.waves, np.int16)).to(self.device)

    @cached_property
    def mels(self) -> Tensor:
        """[frames, 80] float16"""
        flat = np.fromfile(self.folders.mels, np.float16)
        return torch.from_numpy(flat.reshape(-1, MEL_BINS)).to(self.device)

    @cached_property
    def f0(self) -> Tensor:
        """[frames] float32"""
        return torch.from_numpy(self._index["f0"]).to(self.device)

    @cached_property
    def phonemes(self) -> list[str]:
        return [str(phonemes) for phonemes in self._index["phonemes"]]

    @cached_property
    def _encoded(self) -> dict[str, NDArray[np.generic]]:
        return dict(np.load(self.folders.encoded))

    @property
    def tokens(self) -> NDArray[np.integer]:
        """[tokens] of all utterances, what the speech tokenizer made of them."""
        return self._encoded["tokens"]  # type: ignore[return-value]

    @property
    def voices(self) -> NDArray[np.float32]:
        """[utterances, 192], what the speaker encoder made of them."""
        return self._encoded["voices"]  # type: ignore[return-value]

    def padded_waves(self, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Whole utterances: waves [b, longest] float32 in -1..1, zero after the end; lengths [b]."""
        index, lengths = self._spans(self.begins[chosen], self.lengths[chosen])
        inside = torch.arange(index.shape[1], device=self.device) < lengths[:, None]
        return self.waves[index].float() / 32768 * inside, lengths

    def padded_mels(self, chosen: NDArray[np.int64]) -> Tensor:
        """[b, longest, 80] float32; what stands after the end is not meant to be read."""
        index, _ = self._spans(self.begins[chosen] // MEL_HOP, self.lengths[chosen] // MEL_HOP)
        return self.mels[index].float()

    def _spans(self, begins: NDArray[np.int64], lengths: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        begin, length = (torch.from_numpy(a).to(self.device) for a in (begins, lengths))
        steps = torch.arange(int(lengths.max()), device=self.device)
        return begin[:, None] + torch.minimum(steps, length[:, None] - 1), length

    def batches(self, samples: int, *, forever: bool = True) -> Iterator[NDArray[np.int64]]:
        """Numbers of utterances of like length, about `samples` padded samples a batch, in random order."""
        order = np.argsort(self.lengths, kind="stable")
        draw = np.random.default_rng()
        while True:
            jitter = self.lengths[order] * draw.uniform(0.9, 1.1, len(order)) if forever else self.lengths[order]
            ranked = order[np.argsort(jitter, kind="stable")]
            groups = list(_grouped(ranked, self.lengths[ranked], samples))
            if forever:
                draw.shuffle(groups)
            yield from groups
            if not forever:
                return


def _grouped(items: NDArray[np.int64], sizes: NDArray[np.int64], room: int) -> Iterator[NDArray[np.int64]]:
    """Cut items into runs whose count times largest size stays within `room`."""
    begin, largest = 0, 0
    for end, size in enumerate(sizes):
        largest = max(largest, int(size))
        if end > begin and (end - begin + 1) * largest > room:
            yield items[begin:end]
            begin, largest = end, int(size)
    yield items[begin:]
