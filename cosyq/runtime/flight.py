"""A request in flight: what a thread reads of its text, line by line, and what an engine makes of it, meanwhile.

It knows text, ids and who listens; not networks, nor the order in which anything is spoken.
"""

from __future__ import annotations

import logging
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cosyq.errors import CosyqError, UsageError
from cosyq.runtime.clock import SILENCE, Audio, Clock
from cosyq.runtime.decode import Part
from cosyq.runtime.rendering import Rendering
from cosyq.runtime.request import Manner, Options
from cosyq.runtime.synthesizer import Synthesizer

POSITIONS, ROOM = 2048, 2048  # of an utterance: what is shown, and its speech ids; more than any text of ours has

log = logging.getLogger("cosyq.runtime")


class GoneError(CosyqError):
    """It is not spoken any more: it was given up, or everything was."""


class Listener(Protocol):
    """Who asked. Called from the engine's thread, and never waited for."""

    @property
    def cancelled(self) -> bool:
        """Whether the rest is not wanted; looked at between any two steps."""

    def begin(self) -> None:
        """It has a row."""

    def put(self, audio: Audio) -> None:
        """More of it."""

    def end(self, error: CosyqError | None) -> None:
        """Nothing follows."""

    def release(self) -> None:
        """The engine has let go of it."""


@dataclass
class Line:
    """One utterance on its way.

    lead: samples of silence before it.
    parts: what the language model has not been shown yet, each with the text ids that are new in it.
    whole: no part follows those.
    out: its last id was drawn.
    """

    index: int
    text: Callable[[], str]
    generator: torch.Generator
    rendering: Rendering
    room: int
    lead: int = 0
    parts: deque[tuple[Part, int]] = field(default_factory=deque)
    whole: bool = False
    shown: list[tuple[Sequence[int], Sequence[int]]] = field(default_factory=list)  # and not computed yet
    count: int = 0
    last: int = 0
    drawing: bool = False
    out: bool = False


class Flight:
    """One request. One thread adds to its lines and their parts, another speaks them and takes them away.

    longest: seconds of audio, or None.
    """

    def __init__(self, listener: Listener, longest: float | None, wake: Callable[[], None]):
        """`wake` is called whenever there is more."""
        self.listener, self.longest, self._wake = listener, longest, wake
        self.lines: list[Line] = []
        self.written = 0  # lines that there ever were
        self.complete = False  # none follows
        self.error: CosyqError | None = None  # after the lines that there are
        self.clock: Clock | None = None
        self.unread: Callable[[], None] | None = None  # what reads its text, where no thread of its own does
        self.row: int | None = None
        self.started = 0.0  # when its first audio was there, or about to be
        self.sounding = 0  # chunks on their way to the listener
        self.made = self.sent = 0.0  # seconds of audio: with what is on its way, and without

    @property
    def ready(self) -> bool:
        """Whether there is anything to do for it."""
        return bool(self.lines) or self.complete

    @property
    def line_drawn(self) -> Line | None:
        """The one that has a row."""
        return next((line for line in self.lines if line.drawing), None)

    @property
    def dry_at(self) -> float:
        """When what it has got will have been heard; long ago, if it has nothing."""
        return self.started + self.made

    def tell(self, line: Line, lead: int, samples: NDArray[np.float32]) -> bool:
        """Let the listener have `lead` samples of silence and some of a line's; whether that is all it may have."""
        assert self.clock is not None
        if lead and self._put(self.clock.audio(SILENCE, "", line.index - 1, pause=lead)):
            return True
        return len(samples) > 0 and self._put(self.clock.audio(samples, line.text(), line.index))

    def _put(self, audio: Audio) -> bool:
        rate, left = audio.sample_rate, None if self.longest is None else self.longest - self.sent
        cut = left is not None and len(audio.samples) > round(left * rate)
        if cut and left is not None:
            timings = replace(audio.timings, finish="length")
            audio = replace(audio, samples=audio.samples[: round(left * rate)], timings=timings)
        self.sent += len(audio.samples) / rate
        self.listener.put(audio)
        return cut

    def write(self, tts: Synthesizer, text: str | Iterable[str], options: Options) -> None:
        """Read all of a text, which may take as long as it is written; what is wrong with it comes after its lines."""
        error = None
        try:
            manner = tts.requests.manner(options)
            self.clock = tts.clock(manner)
            if isinstance(text, str):
                self._write_text(tts, text, manner)
            else:
                self._write_arriving(tts, text, manner)
        except GoneError:
            pass
        except CosyqError as raised:
            error = raised
        except Exception as raised:
            log.exception("reading failed")
            error = CosyqError(f"internal error: {type(raised).__name__}")
        self.error = error
        self.complete = True
        self._wake()

    def _write_text(self, tts: Synthesizer, text: str, manner: Manner) -> None:
        utterances = tts.requests.utterances(text, manner)
        for utterance in utterances:
            _check(utterance.part.positions)
        lead = 0
        for utterance in utterances:
            line = self._line(tts, manner, lambda said=utterance.said: said, utterance.part.maximum, lead)  # type: ignore[misc]
            self._add(line, utterance.part, utterance.words)
            self._last(line)
            lead = utterance.pause

    def _write_arriving(self, tts: Synthesizer, pieces: Iterable[str], manner: Manner) -> None:
        frame = tts.requests.frame(manner)
        frame = replace(frame, room=min(frame.room, ROOM))
        _check(frame.positions)
        before = None
        for utterance in tts.requests.arriving(self._while_wanted(pieces), manner):
            lead = tts.requests.pause if before is not None and before.ends_paragraph else 0
            line = self._line(tts, manner, lambda said=utterance: said.text, frame.room, lead)  # type: ignore[misc]
            read: list[int] = []
            ids = (read.append(token) or token for token in utterance)  # type: ignore[func-returns-value]
            for part in tts.requests.parts(frame, ids):
                self._add(line, part, len(read))
                read.clear()
            self._last(line)
            before = utterance

    def _while_wanted(self, pieces: Iterable[str]) -> Iterator[str]:
        for piece in pieces:
            if self.listener.cancelled:
                raise GoneError("nobody listens")
            yield piece

    def _line(self, tts: Synthesizer, manner: Manner, text: Callable[[], str], room: int, lead: int) -> Line:
        line = Line(self.written, text, manner.generator(self.written), tts.rendering(manner), room, lead)
        self.lines.append(line)
        self.written += 1
        return line

    def _add(self, line: Line, part: Part, words: int) -> None:
        line.parts.append((part, words))
        self._wake()

    def _last(self, line: Line) -> None:
        line.whole = True
        self._wake()


class Heard:
    """A listener that is read as an iterator."""

    def __init__(self, wake: Callable[[], None]):
        self._items: queue.SimpleQueue[Audio | CosyqError | None] = queue.SimpleQueue()
        self._wake = wake
        self.cancelled = False

    def begin(self) -> None:
        pass

    def put(self, audio: Audio) -> None:
        self._items.put(audio)

    def end(self, error: CosyqError | None) -> None:
        self._items.put(error)

    def release(self) -> None:
        pass

    def chunks(self) -> Iterator[Audio]:
        try:
            while isinstance(item := self._items.get(), Audio):
                yield item
            if item is not None:
                raise item
        finally:
            self.cancelled = True
            self._wake()


def _check(positions: int) -> None:
    if positions > POSITIONS:
        raise UsageError(
            f"the voice's recording, its transcript and the instructions are {positions} tokens",
            remedy=f"{POSITIONS} are the most",
        )
