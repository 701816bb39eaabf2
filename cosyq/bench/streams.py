"""Several requests at once, through what the server speaks with; and how requests are asked and told of anywhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from cosyq.bench.parts import WORDS
from cosyq.bench.timing import Say
from cosyq.runtime.inflight import InFlight, rows_for
from cosyq.runtime.request import Manner
from cosyq.runtime.synthesizer import Synthesizer

ROUNDS = {"cuda": 3, "cpu": 1}  # requests of a stream, one after another


@dataclass(frozen=True)
class Load:
    """What is asked for.

    counts: how many at once, one count after another; each of them asks `rounds` times.
    alone: how many more are asked for then, one after another.
    """

    counts: Sequence[int]
    rounds: int
    alone: int


@dataclass(frozen=True)
class Heard:
    """Of one request: seconds from asking to the first audio and to the end, those of its audio, and by how many of
    them some of it came too late, played from the first audio on."""

    first: float
    whole: float
    audio: float
    late: float

    @classmethod
    def of(cls, pieces: Iterable[int], rate: int) -> Heard:
        """Listen from now on to pieces of audio as they come, in samples or bytes, `rate` of which are a second."""
        started, first, late, count = time.perf_counter(), 0.0, 0.0, 0
        for piece in pieces:
            came = time.perf_counter() - started
            first = first or came
            late = max(late, came - first - count / rate)
            count += piece
        return cls(first, time.perf_counter() - started, count / rate, late)


Ask = Callable[[int], Heard]  # by a seed


@dataclass(frozen=True)
class Streams:
    """So many at once, each asking for one sentence after another; at most `rows` are spoken, the others wait.

    first_audio: the median, and what one request in twenty exceeds.
    interrupted: requests that would have fallen silent, played from their first audio on.
    """

    streams: int
    rows: int
    requests: int
    audio_seconds_per_second: float
    first_audio_seconds_p50: float
    first_audio_seconds_p95: float
    interrupted: int


@dataclass(frozen=True)
class Answers:
    """To a load: for each count, and for each seed of those that were asked alone."""

    streams: tuple[Streams, ...]
    alone: tuple[Heard, ...]


def concurrent(tts: Synthesizer, manner: Manner, load: Load, say: Say) -> Answers:
    """Ask an engine, as many at once as a server would. Nothing else may use it meanwhile."""
    rows = min(max(load.counts), rows_for(tts.engine))

    def ask(seed: int) -> Heard:
        options: dict[str, Any] = {"voice": manner.voice, "steps": manner.steps, "seed": seed}
        return Heard.of((len(chunk.samples) for chunk in batch.stream(WORDS, **options)), tts.sample_rate)

    with (
        ThreadPoolExecutor(max(load.counts), "stream") as pool,
        closing(InFlight(tts, rows=rows)) as batch,
    ):
        say("streams, to warm up")
        batch.warm_up(WORDS)
        return answers(ask, load, rows, pool, tts.engine.device, lambda what: say(f"streams, {what}"))


def answers(ask: Ask, load: Load, rows: int, pool: Executor, device: torch.device, say: Say) -> Answers:
    """`ask` as the load says, from `pool`; on a GPU behind one round of the most at once, elsewhere behind one request.

    What `ask` raises is raised.
    """

    def at_once(count: int, rounds: int) -> list[Heard]:
        asked = [pool.submit(_in_turn, ask, index * rounds, rounds) for index in range(count)]
        return [request for stream in asked for request in stream.result()]

    at_once(max(load.counts) if device.type == "cuda" else 1, 1)
    found = []
    for count in load.counts:
        say(f"{count} at once")
        started = time.perf_counter()
        heard = at_once(count, load.rounds)
        found.append(_summary(count, rows, heard, time.perf_counter() - started))
    if load.alone:
        say("one after another")
    return Answers(tuple(found), tuple(_in_turn(ask, 0, load.alone)))


def _in_turn(ask: Ask, seed: int, rounds: int) -> list[Heard]:
    return [ask(seed + turn) for turn in range(rounds)]


def _summary(count: int, rows: int, heard: list[Heard], passed: float) -> Streams:
    first = sorted(request.first for request in heard)
    return Streams(
        streams=count,
        rows=rows,
        requests=len(heard),
        audio_seconds_per_second=sum(request.audio for request in heard) / passed,
        first_audio_seconds_p50=statistics.median(first),
        first_audio_seconds_p95=first[min(int(0.95 * len(first)), len(first) - 1)],
        interrupted=sum(request.late > 0 for request in heard),
    )
