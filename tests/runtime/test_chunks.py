"""Prompts in chunks: every position once, in order, no tile of two utterances."""

import random

import pytest
import torch

from cosyq.runtime.chunks import chunks

SIZE, TILE = 32, 8


@pytest.mark.parametrize("seed", range(20))
def test_every_position_is_run_once_and_every_end_is_told(seed):
    draw = random.Random(seed)
    prompts = [(row, draw.randrange(50), draw.randint(1, 90)) for row in draw.sample(range(9), draw.randint(1, 6))]
    given, found, ends = 0, [], []
    for chunk in chunks(prompts, size=SIZE, tile=TILE):
        position, owner, place, last = chunk.table
        assert chunk.table.shape == (4, SIZE)
        assert chunk.rows % TILE == 0
        assert (position[chunk.rows :] == -1).all()
        for tile in owner[: chunk.rows].split(TILE):
            assert len(tile.unique()) == 1
        rows = (position >= 0).nonzero()[:, 0].tolist()
        found += [(int(owner[row]), int(position[row]), int(place[row])) for row in rows]
        ends += [(prompt, int(place[last[n]])) for n, prompt in enumerate(chunk.ended)]
    wanted, wanted_ends = [], []
    for index, (row, past, count) in enumerate(prompts):
        wanted += [(row, past + n, given + n) for n in range(count)]
        given += count
        wanted_ends.append((index, given - 1))
    assert found == wanted
    assert ends == wanted_ends


def test_prompts_that_fit_share_a_chunk():
    (chunk,) = chunks([(3, 0, 9), (1, 5, 8), (0, 0, 1)], size=SIZE, tile=TILE)
    assert chunk.rows == 32
    assert chunk.ended == range(3)
    assert torch.equal(chunk.table[1], torch.tensor([3] * 16 + [1] * 8 + [0] * 8, dtype=torch.int32))
