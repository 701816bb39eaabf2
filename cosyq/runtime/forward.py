"""The language model of many utterances at once: rows of a batch, each with its own place in a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cosyq.model.config import LLMConfig
from cosyq.model.llm import KVCache, LanguageModel
from cosyq.runtime.decode import prefill


@dataclass(frozen=True)
class Prompt:
    """Embeddings [1, t, hidden] that a row is shown after its first `past` positions."""

    row: int
    embeddings: Tensor
    past: int


class Forward(Protocol):
    """A forward pass and the key-value cache of `rows` utterances, of `capacity` positions each."""

    config: LLMConfig
    device: torch.device
    rows: int
    capacity: int

    def aside(self) -> AbstractContextManager[None]:
        """Whatever concerns the cache is launched within: on a GPU on a stream of its own."""

    def taken(self, embeddings: Tensor) -> Tensor:
        """What the caller's stream computed, for use aside."""

    def reserve(self, row: int, positions: int) -> None:
        """Let the row have so many positions.

        Raises:
            torch.OutOfMemoryError: the device has no room for them.
        """

    def release(self, row: int) -> None:
        """The row has no positions any more."""

    def prefill(self, prompts: Sequence[Prompt]) -> Tensor:
        """Run what rows are shown, each at most one prompt: the logits behind their ends, [prompts, speech_rows]
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

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def taken(self, embeddings: Tensor) -> Tensor:
        return embeddings

    def reserve(self, row: int, positions: int) -> None:
        pass

    def release(self, row: int) -> None:
        pass

    def prefill(self, prompts: Sequence[Prompt]) -> Tensor:
        keys, values, found = self._cache.keys, self._cache.values, []
        for p in prompts:  # one by one: what a row says depends on nobody beside it
            own = KVCache(keys[:, p.row : p.row + 1], values[:, p.row : p.row + 1], p.past)
            found.append(prefill(self._llm, p.embeddings, own))
        return torch.stack(found)

    def __call__(self, ids: Tensor, positions: Tensor, span: int) -> Tensor:
        return self._llm.step(ids, positions, self._cache, span)
