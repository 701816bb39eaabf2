"""Speaking faster or slower: mel frames read at another pace, in chunks that join.

Linear interpolation between neighbouring frames, as the original does for whole utterances; pitch stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

SLOWEST, FASTEST = 0.5, 2.0


class Pace:
    """One utterance's frames at `speed`. Output frame j is the input at position j * speed."""

    def __init__(self, speed: float):
        self.speed = speed
        self._held: Tensor | None = None  # input frames from position `_first` on
        self._first = 0
        self._out = 0

    def frames(self, mel: Tensor) -> Tensor:
        """The next frames [mel, t] -> those that can be given now, [mel, m]; all of them by the end of the input."""
        if self.speed == 1.0:
            return mel
        held = mel if self._held is None else torch.cat([self._held, mel], dim=-1)
        last = self._first + held.shape[-1] - 1
        count = max(int(last / self.speed) + 1 - self._out, 0)
        positions = (self._out + torch.arange(count, device=mel.device, dtype=torch.float64)) * self.speed - self._first
        left = positions.long()
        share = (positions - left).float()
        right = (left + 1).clamp(max=held.shape[-1] - 1)
        self._out += count
        keep = min(int(self._out * self.speed), last) - self._first
        self._held, self._first = held[:, keep:].clone(), self._first + keep
        return torch.lerp(held[:, left], held[:, right], share)
