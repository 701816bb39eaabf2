"""The engine `fused`: our own kernels on a CUDA GPU, over the packed weights as they are stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from cosyq.artifact.reader import Artifact
from cosyq.runtime.batch import BatchDecoder, follow_alone
from cosyq.runtime.decode import Part
from cosyq.runtime.engine import TorchEngine
from cosyq.runtime.fused_llm import BURST, FusedDecoder, FusedForward, FusedLM
from cosyq.runtime.fused_vocoder import FusedVocoder

ALONE = 2048  # positions that the decoder of a single utterance is made for, unless one needs more


class FusedEngine(TorchEngine):
    """Weights are read once, by the reference's own reader; what the kernels do not need of it goes again.

    Raises:
        DeviceError: the device is missing or too small.
    """

    def __init__(self, artifact: Artifact, device: torch.device, dtype: torch.dtype):
        super().__init__(artifact, "fused", device, dtype)
        self._lm = FusedLM(self.llm, dtype)
        self.vocoder = FusedVocoder(self.vocoder)
        self._alone: FusedDecoder | None = None

    def speech_tokens(
        self, parts: Iterable[Part], *, positions: int, room: int, generator: torch.Generator
    ) -> Iterator[int]:
        alone = self._alone
        if alone is None or not alone.free or not alone.fits(positions, room):
            alone = self._alone = self.decoder(1, positions=max(positions, ALONE - room), room=max(room, ALONE))
        return (yield from follow_alone(alone, self.embed, parts, room=room, generator=generator))

    def decoder(self, rows: int, *, positions: int, room: int) -> FusedDecoder:
        forward = FusedForward(self._lm, rows=rows, capacity=positions + room)
        return FusedDecoder(forward, self.config.sampling, longest=room, burst=BURST)
