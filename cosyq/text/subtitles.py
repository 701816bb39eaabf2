"""Subtitles in SubRip's format, from what was said and how many samples it took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cue:
    """A text, and the samples from `begin` up to `end` that it is heard in."""

    text: str
    begin: int
    end: int


class Subtitles:
    """One cue an utterance, from its chunks in order."""

    def __init__(self, sample_rate: int):
        self._sample_rate = sample_rate
        self._position = 0
        self._cues: dict[int, Cue] = {}

    def add(self, utterance: int, text: str, samples: int, pause: int) -> None:
        """The next `samples` are of this utterance, and the last `pause` of them silent."""
        begin = self._cues[utterance].begin if utterance in self._cues else self._position
        self._position += samples
        self._cues[utterance] = Cue(text, begin, self._position - pause)

    def to_srt(self) -> str:
        blocks = (
            f"{number}\n{self._time(cue.begin)} --> {self._time(cue.end)}\n{cue.text}\n"
            for number, cue in enumerate(self._cues.values(), 1)
        )
        return "\n".join(blocks)

    def _time(self, samples: int) -> str:
        """Hours:minutes:seconds,milliseconds; rounded the same way everywhere, so that cues do not overlap."""
        seconds, milliseconds = divmod(samples * 1000 // self._sample_rate, 1000)
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours:02}:{minutes:02}:{seconds:02},{milliseconds:03}"
