"""How the prompts of several utterances are laid out for the language model's passes: which rows of which pass.

A tile of attention is of one utterance, so each prompt begins at a multiple of a tile's rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """Positions of prompts that are run together.

    table: int32 [4, size]. Of each row its position, -1 where it is nobody's; its utterance; its place among all
    positions that were given; and in the last line, one after the other, the rows that end a prompt.
    rows: how many are in use; ended: the prompts that end here.
    """

    table: Tensor
    rows: int
    ended: range


def chunks(prompts: Sequence[tuple[int, int, int]], *, size: int, tile: int) -> Iterator[Chunk]:
    """Lay out prompts (utterance, positions before, positions), in order, in chunks of `size` rows, whole tiles."""
    table, used, given, ended = _empty(size), 0, 0, range(0)
    for index, (utterance, past, count) in enumerate(prompts):
        done = 0
        while done < count:
            if used == size:
                yield Chunk(table, used, ended)
                table, used, ended = _empty(size), 0, range(index, index)
            part = min(count - done, size - used)
            end = used + -(-part // tile) * tile
            table[0, used : used + part] = torch.arange(past + done, past + done + part)
            table[1, used:end] = utterance
            table[2, used : used + part] = torch.arange(given + done, given + done + part)
            done += part
            if done == count:
                table[3, len(ended)] = used + part - 1
                ended = range(ended.start, index + 1)
            used = end
        given += count
    yield Chunk(table, used, ended)


def _empty(size: int) -> Tensor:
    table = torch.zeros(4, size, dtype=torch.int32)
    table[0] = -1
    return table
