"""Which of the chunks that are due are rendered next, and which are left until more are due."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

IN_HAND = 0.5  # seconds of audio with which a stream can wait for another's first
IDS_HELD = 16  # and for how many ids of each row: those of a first chunk
BESIDE = 2  # a first chunk is rendered with others' later ones up to a half of what is worth it
TOGETHER = 0.5  # of what is worth it, that is due before a stream with audio in hand is rendered


@dataclass(frozen=True)
class Due:
    """A chunk that can be rendered.

    heard: its stream has audio.
    dry_at: when that will have been played, in seconds of any clock; long ago, if it has none.
    frames: of a pass of the flow, in so many Euler `steps`.
    """

    heard: bool
    dry_at: float
    frames: int
    steps: int


@dataclass(frozen=True)
class Expected:
    """What is not due yet.

    first: a stream's first chunk is among it.
    more: a chunk of any stream is.
    held: ids of each row that were drawn since a render.
    """

    first: bool
    more: bool
    held: int


def chosen(due: Sequence[Due], expected: Expected, now: float, frames: int) -> list[int]:
    """Which of `due`, given in order of arrival, share the next pass, the most urgent one first; none is to wait.

    First chunks come first, then those of the streams which would run dry first. A stream that has audio in hand waits
    a little for another's first chunk, and for company: a frame takes less of a pass of many.

    frames: how many are worth a pass.
    """
    if not due:
        return []
    order = sorted(range(len(due)), key=lambda index: due[index].dry_at)
    driest = due[order[0]]
    can_wait = driest.heard and driest.dry_at - now > IN_HAND
    if can_wait and expected.first and expected.held < IDS_HELD:
        return []
    found, taken = order[:1], driest.frames
    for index in order[1:]:
        one = due[index]
        # What has to be quick, a first chunk, takes others along as far as they cost it little.
        most = frames if one.heard == driest.heard else frames // BESIDE
        if one.steps == driest.steps and taken + one.frames <= most:
            found.append(index)
            taken += one.frames
    return [] if can_wait and expected.more and taken < TOGETHER * frames else found
