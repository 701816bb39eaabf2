"""What a request has become: its audio, and what it took."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosyq.runtime.decode import Finish

SILENCE = np.empty(0, np.float32)


@dataclass(frozen=True)
class Timings:
    """Seconds and counts of one request. For a chunk of a stream, of everything up to it."""

    load_seconds: float
    first_audio_seconds: float
    total_seconds: float
    audio_seconds: float
    text_tokens: int
    speech_tokens: int
    token_seconds: float  # spent in the language model
    finish: str  # "stop", "length", or "" while it goes on
    waited_seconds: float = 0.0  # for text that was still being written, a part of the first two

    @property
    def real_time_factor(self) -> float:
        return (self.total_seconds - self.waited_seconds) / self.audio_seconds if self.audio_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.speech_tokens / self.token_seconds if self.token_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "real_time_factor": self.real_time_factor,
            "tokens_per_second": self.tokens_per_second,
        }


@dataclass(frozen=True)
class Audio:
    """A whole request, one utterance of it, or a chunk of one.

    samples: [n] float32 in -1..1.
    seed: the request's.
    text: what the utterance says; of a text that was still being written, as much of it as was read.
    utterance: its number in the request.
    pause: how many of the samples, at their end, are the silence after a paragraph.
    """

    samples: NDArray[np.float32]
    sample_rate: int
    seed: int
    timings: Timings
    text: str = ""
    utterance: int = 0
    pause: int = 0


class Clock:
    """Times one request, over all its utterances, and makes its audio of samples."""

    def __init__(self, load_seconds: float, sample_rate: int, seed: int, text_tokens: int = 0):
        self._sample_rate, self._seed = sample_rate, seed  # the request's own seed: what reproduces it
        self._start = time.perf_counter()
        self._base = Timings(load_seconds, 0.0, 0.0, 0.0, text_tokens, 0, 0.0, "")

    def waiting(self, pieces: Iterable[str]) -> Iterator[str]:
        """Pass the pieces of a text on, timing how long they take to come."""
        arriving = iter(pieces)
        while True:
            started = time.perf_counter()
            try:
                piece = next(arriving)
            except StopIteration:
                return
            finally:
                waited = self._base.waited_seconds + time.perf_counter() - started
                self._base = replace(self._base, waited_seconds=waited)
            yield piece

    def reading(self, text: Iterable[int]) -> Iterator[int]:
        """Pass text ids on, counting them."""
        for token in text:
            self.read(1)
            yield token

    def read(self, count: int) -> None:
        self._base = replace(self._base, text_tokens=self._base.text_tokens + count)

    def drawn(self, count: int, seconds: float) -> None:
        """So many more of the language model's tokens, and its time."""
        count, seconds = self._base.speech_tokens + count, self._base.token_seconds + seconds
        self._base = replace(self._base, speech_tokens=count, token_seconds=seconds)

    def ended(self, finish: Finish) -> None:
        """An utterance's tokens did. One that was cut is worth knowing of, whatever comes after it."""
        if self._base.finish != "length":
            self._base = replace(self._base, finish=finish)

    def counted(self, tokens: Iterator[int]) -> Iterator[int]:
        """Pass the language model's tokens on, counting them and its time, and keep how it ended."""
        while True:
            started, waited = time.perf_counter(), self._base.waited_seconds
            try:
                token = next(tokens)
            except StopIteration as stop:
                self.ended(stop.value)
                return
            self.drawn(1, time.perf_counter() - started - (self._base.waited_seconds - waited))
            yield token

    def audio(self, samples: NDArray[np.float32], text: str = "", utterance: int = 0, *, pause: int = 0) -> Audio:
        """More samples of the request, with a pause after them and the timings now that they were made."""
        samples = np.pad(samples, (0, pause))
        now = time.perf_counter() - self._start
        first = self._base.first_audio_seconds or now
        seconds = self._base.audio_seconds + len(samples) / self._sample_rate
        self._base = replace(self._base, first_audio_seconds=first, total_seconds=now, audio_seconds=seconds)
        return Audio(samples, self._sample_rate, self._seed, self._base, text, utterance, pause)
