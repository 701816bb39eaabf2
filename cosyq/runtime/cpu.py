"""The engine `cpu`: the language model's rows of int8 as they are stored, multiplied by torch's own kernel.

A step of the language model reads all of its weights for one id, so bytes are its time; the flow's weights are shared
by the frames of a chunk, and unpacked at load.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from cosyq.runtime.batch import SPAN, follow_alone
from cosyq.runtime.decode import Part
from cosyq.runtime.engine import TorchEngine


class CpuEngine(TorchEngine):
    """An utterance is a row of a batch even when it is alone: whoever is beside it, its ids are the same to the bit."""

    def speech_tokens(
        self, parts: Iterable[Part], *, positions: int, room: int, generator: torch.Generator
    ) -> Iterator[int]:
        capacity = -(-(positions + room) // SPAN) * SPAN  # attention over a part of one sums in another order
        alone = self.decoder(1, positions=capacity - room, room=room)
        return (yield from follow_alone(alone, self.embed, parts, room=room, generator=generator))
