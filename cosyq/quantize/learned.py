"""Codes that are learned: a packed weight that gradients of a whole network's output reach.

Beside each code lies a latent value, in units of its block's absmax; the code is the one nearest to it, and the latent
moves against the code's gradient (straight through, arXiv 1308.3432). absmax stay as they are, so everything that is
reached can be stored. AutoRound (arXiv 2309.05516) learns codes likewise, from what single blocks give out.

A latent begins where coordinate descent would put the weight beside all others: where two codes are as good for the
layer, little decides which is better for the network, and elsewhere much has to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosyq.quantize.calibrated import damped
from cosyq.quantize.formats import Format
from cosyq.quantize.grid import Grid

INSIDE = 0.98  # of the way from a level to where the next begins: how far off a latent may begin
MOMENTUM, MEMORY = 0.9, 0.95  # of gradients, and of their mean square


class LearnedCodes:
    """Of one weight [out, in], on the device of its tensors.

    Steps have one measure for the whole matrix, its gradient's RMS (so does Adam-mini, arXiv 2406.16793). With one for
    each weight, as Adam has, those that hardly matter would change as fast as the others.
    """

    def __init__(self, weight: Tensor, moment: Tensor, fmt: Format, tensors: dict[str, Tensor]):
        """weight float32 [out, in] as it was, moment [in, in] of its inputs, tensors as packed; all on one device.

        Raises:
            ValueError: as `Grid.of`.
        """
        out, width = weight.shape
        self._grid = Grid.of(tensors, fmt, (out, width))
        cells, self._absmax = self._grid.chosen()
        self._between = (self._grid.levels[1:] + self._grid.levels[:-1]) / 2
        self._pace = (self._grid.levels[-1] - self._grid.levels[0]) / (len(self._grid.levels) - 1)
        levels, seen, spread = self._grid.levels[cells], damped(moment.float()), self._spread()
        packed = levels * spread
        wanted = (packed + (weight - packed) @ seen / seen.diagonal()) / torch.where(spread == 0, 1, spread)
        ends = self._between.new_tensor([torch.inf])
        low, high = (
            INSIDE * (edge[cells] - levels)
            for edge in (torch.cat([-ends, self._between]), torch.cat([self._between, ends]))
        )
        self._latent = levels + (wanted - levels).clamp(low, high)
        self._drift, self._square, self._steps = torch.zeros_like(weight), weight.new_zeros(()), 0

    def weight(self) -> Tensor:
        """As packed now: float32 [out, in]."""
        return self._grid.levels[self._cells()] * self._spread()

    def tensors(self) -> dict[str, Tensor]:
        """As `pack` gives them, on the host."""
        return {name: tensor.cpu() for name, tensor in self._grid.stored(self._cells(), self._absmax).items()}

    def step(self, gradient: Tensor, rate: float) -> None:
        """Move against the weight's gradient [out, in], by about `rate` of the mean distance between levels."""
        gradient = gradient * self._spread()
        self._steps += 1
        self._drift.lerp_(gradient, 1 - MOMENTUM)
        self._square = MEMORY * self._square + (1 - MEMORY) * gradient.square().mean()
        size = (self._square / (1 - MEMORY**self._steps)) ** 0.5 * (1 - MOMENTUM**self._steps)
        self._latent -= rate * self._pace * self._drift / torch.where(size == 0, 1, size)

    def _cells(self) -> Tensor:
        return torch.bucketize(self._latent, self._between)

    def _spread(self) -> Tensor:
        return self._absmax.repeat_interleave(self._grid.block, dim=1)
