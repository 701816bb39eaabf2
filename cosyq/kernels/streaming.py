"""Signals that come in chunks: buffers with their past in front, and how a kernel writes one.

A signal is rows of channels. In front of row 0 of a buffer lies what the chunk before left, as far back as a reader
looks. Who writes a buffer (`emit`) puts this old tail there and hands the new one on. So a convolution reads plain
rows, no state is copied layer by layer, and a chunk of any length gives the same sums in the same order.

Launches are as large as the longest chunk needs; how much of it is real stands in `counts`, on the device, so that one
recorded graph serves every chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

COUNTS = 4  # int32: mel frames, whether the chunk is the first and the last, where its noise starts
MARGIN = 64  # rows in front of a buffer: no reader looks further back


@dataclass(frozen=True)
class Rows:
    """A buffer [groups, MARGIN + rows, channels], and the tails in front of this chunk and in front of the next.

    The groups' tails, each [past, channels] of its own reader, lie one after the other.
    """

    data: Tensor
    tail_in: Tensor
    tail_out: Tensor

    @property
    def start(self) -> Tensor:
        """From row 0 of the first group on."""
        return self.data[0, MARGIN:]

    @property
    def stride(self) -> int:
        return self.data.stride(0)


@dataclass(frozen=True)
class Extent:
    """How many rows a launch makes: frames * rate, and one more in an utterance's first chunk where `extra`."""

    frames: int  # of the longest chunk
    rate: int
    extra: bool = False

    @property
    def most(self) -> int:
        return self.frames * self.rate + self.extra


@dataclass(frozen=True)
class Tile:
    """What one program of a product makes, and how: depth is of its sums."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
