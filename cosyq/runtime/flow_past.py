"""What a flow keeps of frames that nothing can change any more: whole blocks of a voice's prompt and of an utterance.

Attention is block-causal in a stream, so keys and values of whole blocks are the same in every later chunk of an
utterance, those of a prompt in every utterance of a voice, at each Euler step of each branch: 1.8 MB a frame of the
published model, and the few rows that the convolutions look back to. A chunk that goes on from them costs the flow its
own frames and none that came before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor

from cosyq.model.config import FlowConfig

MOST = 1024  # voices that are remembered to have been asked for
VOICES = 0.5  # of the room, at most


@dataclass(frozen=True, eq=False)
class Segment:
    """Of `frames` frames; `memory` [steps, numbers] in the flow's type, as `kernels.dit` reads and writes it."""

    frames: int
    memory: Tensor

    @classmethod
    def empty(cls, config: FlowConfig, frames: int, steps: int, *, dtype: torch.dtype, device: torch.device) -> Segment:
        return cls(frames, torch.empty(steps, numbers(config, frames), dtype=dtype, device=device))


@dataclass
class FlowState:
    """What is kept of an utterance's frames, from the first one of its voice's prompt on."""

    segments: tuple[Segment, ...] = ()

    @property
    def frames(self) -> int:
        return total(self.segments)


def total(segments: Sequence[Segment]) -> int:
    return sum(segment.frames for segment in segments)


def tail_numbers(config: FlowConfig) -> int:
    """How many are kept of a step of what was convolved."""
    return 2 * 2 * (config.conv_kernel - 1) * config.dim


def frame_numbers(config: FlowConfig) -> int:
    """How many are kept of a step of a frame's keys and values."""
    return config.depth * 2 * 2 * config.heads * config.head_dim


def numbers(config: FlowConfig, frames: int) -> int:
    """How many are kept of a step."""
    return tail_numbers(config) + frames * frame_numbers(config)


def whole_blocks(config: FlowConfig, prompt_frames: int) -> int:
    """The frames of a prompt that can be kept: of whole blocks, their look-ahead in it too."""
    known = max(prompt_frames - config.lookahead * config.token_mel_ratio, 0)
    frames = known // config.chunk_frames * config.chunk_frames
    return frames if frames >= config.conv_kernel else 0


class Pasts:
    """Kept in at most `room` bytes, while anybody refers to it; of voices, those not asked for the longest go first.

    What is asked for the first time is not made yet: that would delay a first audio, and the voice may not come again.
    """

    def __init__(self) -> None:
        self.room = 0
        self._voices: OrderedDict[Hashable, Segment | None] = OrderedDict()  # None: asked for once
        self._there: WeakSet[Segment] = WeakSet()

    def find(self, key: Hashable) -> Segment | None:
        return self._voices.get(key)

    def get(self, key: Hashable, size: int, make: Callable[[], Segment]) -> Segment | None:
        """What is kept of a voice and a number of steps; `size` in bytes. Only others' place is taken for it."""
        most = int(VOICES * self.room)
        if not 0 < size <= most:
            return None
        asked = key in self._voices
        past = self._voices.pop(key, None)
        if asked and past is None:
            while self._voices and _bytes(filter(None, self._voices.values())) + size > most:
                self._voices.popitem(last=False)
            past = self.segment(size, make)
        self._voices[key] = past
        if len(self._voices) > MOST:
            self._voices.popitem(last=False)
        return past

    def segment(self, size: int, make: Callable[[], Segment]) -> Segment | None:
        """A new one of `size` bytes, if there is room: counted until nobody refers to it."""
        if _bytes(self._there) + size > self.room:
            return None
        try:
            made = make()
        except torch.OutOfMemoryError:  # others hold what was free
            return None
        self._there.add(made)
        return made


def _bytes(segments: Iterable[Segment]) -> int:
    return sum(segment.memory.nbytes for segment in segments)
