"""What a server needs of whatever speaks: requests go in, chunks of audio come out, and either side may stop.

A `Speaker` works in threads of its own; its callers are coroutines. A `Speech` is where they meet: one request, its
audio on the way, and the wish to stop. Nothing here knows HTTP, torch, or how many requests are spoken at once.
"""

from __future__ import annotations

import asyncio
import threading
import time
import unicodedata
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cosyq.errors import CosyqError

# What an engine may be asked for; other speeds are stretched behind it. (Of `runtime.speed`, which needs torch.)
SLOWEST, FASTEST = 0.5, 2.0
# Reading aloud takes about 0.07 s a letter in English and 0.2 s a character in Chinese, digits more. This is six and
# four times that: what goes on for longer will not end by itself.
SECONDS_AT_LEAST, SECONDS_PER_LETTER, SECONDS_PER_WIDE = 4.0, 0.4, 0.8


class BusyError(CosyqError):
    """Too many requests wait, or this one has waited too long. `retry_after` is in seconds."""

    def __init__(self, what: str, *, retry_after: float):
        super().__init__(what, remedy=f"try again in {retry_after:.1f} seconds")
        self.retry_after = retry_after


class UnavailableError(CosyqError):
    """The speaker is not loaded yet, is being shut down, or its device has failed."""


class DeadlineError(CosyqError):
    """The request was not done in its time."""


@dataclass(frozen=True)
class SpeechRequest:
    """What to say and how.

    text: all of it, or an iterator of its pieces, which is asked in a thread and may wait for more.
    voice: one of the speaker's names.
    speed: SLOWEST to FASTEST.
    instruct: how to say it, or None.
    normalize: whether numbers and symbols are read in words.
    """

    text: str | Iterator[str]
    voice: str
    seed: int
    speed: float = 1.0
    instruct: str | None = None
    normalize: bool = True

    @property
    def longest_seconds(self) -> float | None:
        """More audio than this is no reading of the text; None of one that is not there yet."""
        if not isinstance(self.text, str):
            return None
        wide = sum(c.isnumeric() or unicodedata.east_asian_width(c) == "W" for c in self.text)
        letters = SECONDS_PER_LETTER * (len(self.text) - wide) + SECONDS_PER_WIDE * wide
        return (SECONDS_AT_LEAST + letters) / self.speed


@dataclass(frozen=True)
class Chunk:
    """Audio as it is made, and the counts up to its end.

    samples: [n] float32 in -1..1.
    finish: "stop" or "length" with the last one.
    utterance, text: whose audio it is, by number, and what is said in it, as far as that is known.
    pause: how many of the samples, at their end, are the silence after it.
    """

    samples: NDArray[np.float32]
    text_tokens: int
    speech_tokens: int
    finish: str = ""
    utterance: int = 0
    text: str = ""
    pause: int = 0


@dataclass(frozen=True)
class Stats:
    """waiting and active: requests. retry_after: seconds until there is room. memory_bytes: of the device."""

    waiting: int
    active: int
    retry_after: float
    memory_bytes: int


class Speaker(Protocol):
    """One model on one device. Its methods are called from one event loop, and but for those of voices none waits."""

    sample_rate: int

    def voices(self) -> list[str]:
        """Names, the default one first."""

    def about(self) -> dict[str, Any]:
        """The engine, its device, and how each stage is quantized, for people."""

    def submit(self, request: SpeechRequest) -> Speech:
        """Queue a request. What is wrong with it is raised where its first chunk is awaited.

        Audio is cut, with finish "length", at the request's `longest_seconds`.

        Raises:
            BusyError: the queue is full.
            UnavailableError: it was closed, or has failed for good.
        """

    def add_voice(self, name: str, audio: Path, transcript: str) -> None:
        """Make a voice of a recording and keep it. It takes seconds: call it in a thread.

        Raises:
            UsageError: the name, the recording or the transcript will not do.
            UnavailableError: there are no encoders here, or the voice cannot be kept.
        """

    def remove_voice(self, name: str) -> None:
        """Take a voice out, for good.

        Raises:
            UnavailableError: it cannot be written.
        """

    def stats(self) -> Stats: ...

    def close(self) -> None:
        """Stop what is spoken, refuse what comes, let the threads end."""


class Speech:
    """One request on its way. Made in the event loop that reads it; iterating over it gives its chunks.

    Audio that nobody has read yet is kept: an engine never waits for a slow client. How much that can be is bounded
    by `longest_seconds`, and how long by the caller's deadline.
    """

    def __init__(self, request: SpeechRequest, wake: Callable[[], None] = lambda: None):
        """`wake` is called when the request is cancelled, from the event loop."""
        self.request = request
        self.accepted = time.monotonic()
        self.began = self.ended = self.cancelled_at = self.released_at = 0.0  # of the same clock; 0 is not yet
        self.started = asyncio.Event()  # an engine works on it, or will not
        self.released = asyncio.Event()  # it does no more
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Chunk | CosyqError | None] = asyncio.Queue()
        self._cancelled = threading.Event()
        self._wake = wake

    # ---- the engine's side, from any thread

    @property
    def cancelled(self) -> bool:
        """Whether its audio is still wanted; engines look between any two steps."""
        return self._cancelled.is_set()

    def begin(self) -> None:
        self.began = time.monotonic()
        self._post(self.started.set)

    def put(self, chunk: Chunk) -> None:
        self._post(self._items.put_nowait, chunk)

    def end(self, error: CosyqError | None = None) -> None:
        """Nothing follows. Only the first call counts for the reader."""
        self.ended = self.ended or time.monotonic()
        self._post(self._items.put_nowait, error)
        self._post(self.started.set)

    def release(self) -> None:
        """The engine has let go of it."""
        self.released_at = time.monotonic()
        self._post(self.released.set)

    def _post(self, call: Callable[..., None], *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody reads any more
            self._loop.call_soon_threadsafe(call, *arguments)

    # ---- the reader's side

    def cancel(self) -> None:
        if not self._cancelled.is_set():
            self.cancelled_at = time.monotonic()
            self._cancelled.set()
            self._wake()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        """The next chunk.

        Raises:
            UsageError: what was asked for cannot be spoken.
            CosyqError: anything else that went wrong.
        """
        item = await self._items.get()
        if isinstance(item, Chunk):
            return item
        self._items.put_nowait(item)  # whoever asks again gets the same answer
        if item is None:
            raise StopAsyncIteration
        raise item
