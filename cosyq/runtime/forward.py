"""The language model of many utterances at once: rows of a batch, each with its own place in a key-value cache."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from cosyq.model.config import LLMConfig
from cosyq.model.llm import KVCache, LanguageModel
from cosyq.runtime.decode import prefill


class Forward(Protocol):
    """A forward pass and the key-value cache of `rows` utterances, of `capacity` positions each."""

    config: LLMConfig
    device: torch.device
    rows: int
    capacity: int

    def prefill(self, row: int, embeddings: Tensor, past: int) -> Tensor:
        """Run embeddings [1, t, hidden] after the row's first `past` positions: the last one's logits, [speech_rows]
        float32."""

    def __call__(self, ids: Tensor, positions: Tensor, span: int) -> Tensor:
        """Run one speech id of each of the first b rows, ids [b] int64, at its position, [b] int64: logits
        [b, speech_rows] float32.

        A position is overwritten, and what lies behind it is not seen. `span` is more than any position whose result
        matters. Both b and `span` take few values. Nothing here may wait for the device.
        """


class TorchForward:
    """Plain torch, on any device and over any weights."""

    def __init__(self, llm: LanguageModel, *, rows: int, capacity: int):
        self.config, self.device = llm.config, llm.norm.weight.device
        self.rows, self.capacity = rows, capacity
        self._llm = llm
        self._cache = KVCache.empty(llm.config, capacity, batch=rows, device=self.device, dtype=llm.norm.dtype)
        self._cache.keys.zero_()  # what a mask hides must still be finite
        self._cache.values.zero_()

    def prefill(self, row: int, embeddings: Tensor, past: int) -> Tensor:
        own = KVCache(self._cache.keys[:, row : row + 1], self._cache.values[:, row : row + 1], past)
        return prefill(self._llm, embeddings, own)

    def __call__(self, ids: Tensor, positions: Tensor, span: int) -> Tensor:
        return self._llm.step(ids, positions, self._cache, span)
