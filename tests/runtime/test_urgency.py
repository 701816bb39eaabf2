"""Whose chunk is rendered next."""

from dataclasses import replace

import pytest

from cosyq.runtime.urgency import BESIDE, IDS_HELD, IN_HAND, TOGETHER, Due, Expected, chosen

NOW = 1000.0
NEW = Due(heard=False, dry_at=0, frames=100, steps=10)
POOR = Due(heard=True, dry_at=NOW + IN_HAND / 5, frames=100, steps=10)
RICH = replace(POOR, dry_at=NOW + 8)
NOTHING = Expected(first=False, more=False, held=0)
FIRST = Expected(first=True, more=True, held=0)
MORE = Expected(first=False, more=True, held=0)


@pytest.mark.parametrize(
    ("due", "expected", "found"),
    [
        ([], NOTHING, []),
        ([RICH, POOR], NOTHING, [1]),
        ([RICH, POOR, NEW], NOTHING, [2]),
        ([RICH], NOTHING, [0]),
        ([RICH], FIRST, []),  # has audio in hand: somebody's first chunk is about to be due
        ([RICH], replace(FIRST, held=IDS_HELD, more=False), [0]),  # but not for ever
        ([RICH, POOR], FIRST, [1]),  # and nobody is left to run dry for it
        ([NEW], FIRST, [0]),
    ],
)
def test_whoever_runs_dry_first_is_next(due, expected, found):
    assert chosen(due, expected, NOW, 0) == found


@pytest.mark.parametrize(
    ("due", "frames", "found"),
    [
        ([RICH, POOR], 400, [1, 0]),
        ([NEW, NEW], 400, [0, 1]),  # in order of arrival
        ([RICH, POOR, NEW, NEW], 400, [2, 3]),  # first ones are not made to wait for more of others
        ([RICH, POOR, NEW], 400 * BESIDE, [2, 1, 0]),  # but as far as that is short
        ([RICH, replace(POOR, frames=350), POOR], 400, [1]),  # what has no room waits
        ([POOR, replace(RICH, frames=350), RICH], 400, [0, 2]),
        ([NEW, replace(NEW, steps=6)], 400, [0]),
    ],
)
def test_others_are_rendered_beside_it(due, frames, found):
    assert chosen(due, NOTHING, NOW, frames) == found


@pytest.mark.parametrize(
    ("due", "expected", "found"),
    [
        ([RICH], MORE, []),  # the few frames that are due can wait for more
        ([RICH, RICH], MORE, [0, 1]),
        ([POOR], MORE, [0]),
        ([RICH], NOTHING, [0]),  # nothing else will be due
    ],
)
def test_who_has_audio_in_hand_waits_for_company(due, expected, found):
    assert chosen(due, expected, NOW, round(200 / TOGETHER)) == found


def test_nobody_waits_for_ever():
    """Whatever is expected, a chunk is rendered by the time its stream has little left."""
    for expected in (FIRST, MORE, replace(FIRST, held=IDS_HELD)):
        assert chosen([RICH], expected, RICH.dry_at - IN_HAND, 10_000) == [0]
