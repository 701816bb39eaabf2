"""What a flow keeps of frames that nothing can change any more: a voice's prompt, as far as its blocks are whole.

Attention is block-causal in a stream, so keys and values of whole blocks are the same in every chunk of every utterance
of a voice, at each Euler step of each branch: 1.8 MB a frame of the published model, and the few rows that the
convolutions look back to. A chunk that goes on from them costs the flow its own frames and not the prompt's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from cosyq.model.config import FlowConfig

MOST = 1024  # voices that are remembered to have been asked for


@dataclass(frozen=True)
class Past:
    """Of `frames` frames; `memory` [steps, numbers] in the flow's type, as `kernels.dit` reads it."""

    frames: int
    memory: Tensor

    @classmethod
    def empty(cls, config: FlowConfig, frames: int, steps: int, *, dtype: torch.dtype, device: torch.device) -> Past:
        return cls(frames, torch.zeros(steps, numbers(config, frames), dtype=dtype, device=device))

    def address(self, step: int) -> int:
        return self.memory[step].data_ptr()

    def tails(self, config: FlowConfig, step: int) -> Tensor:
        """What each convolution read last, [convolutions, branches, taps - 1, dim]."""
        return self.memory[step, : tail_numbers(config)].view(2, 2, config.conv_kernel - 1, config.dim)

    def keys_and_values(self, config: FlowConfig, step: int) -> Tensor:
        """[layers, branches, frames, 2 * heads * head_dim]."""
        return self.memory[step, tail_numbers(config) :].view(config.depth, 2, self.frames, -1)


def tail_numbers(config: FlowConfig) -> int:
    return 2 * 2 * (config.conv_kernel - 1) * config.dim


def numbers(config: FlowConfig, frames: int) -> int:
    """How many are kept of a step."""
    return tail_numbers(config) + config.depth * 2 * frames * 2 * config.heads * config.head_dim


def whole_blocks(config: FlowConfig, prompt_frames: int) -> int:
    """The frames of a prompt that can be kept: of whole blocks, their look-ahead in it too."""
    known = max(prompt_frames - config.lookahead * config.token_mel_ratio, 0)
    frames = known // config.chunk_frames * config.chunk_frames
    return frames if frames >= config.conv_kernel else 0


class Pasts:
    """Kept in at most `room` bytes; those not asked for the longest go first.

    What is asked for the first time is not made yet: that would delay a first audio, and the voice may not come again.
    """

    def __init__(self) -> None:
        self.room = 0
        self._kept: OrderedDict[Hashable, Past | None] = OrderedDict()  # None: asked for once

    def find(self, key: Hashable) -> Past | None:
        return self._kept.get(key)

    def get(self, key: Hashable, size: int, make: Callable[[], Past]) -> Past | None:
        """What is kept of a voice and a number of steps; `size` in bytes."""
        if not 0 < size <= self.room:
            return None
        asked = key in self._kept
        past = self._kept.pop(key, None)
        if asked and past is None:
            while self._bytes() + size > self.room:
                self._kept.popitem(last=False)
            past = make()
        self._kept[key] = past
        if len(self._kept) > MOST:
            self._kept.popitem(last=False)
        return past

    def _bytes(self) -> int:
        return sum(past.memory.nbytes for past in self._kept.values() if past is not None)
