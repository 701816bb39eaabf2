"""Several requests at once, through what the server speaks with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from cosyq.bench.parts import WORDS
from cosyq.bench.timing import Say
from cosyq.runtime.inflight import InFlight, rows_for
from cosyq.runtime.request import Manner
from cosyq.runtime.synthesizer import Synthesizer

ROUNDS = {"cuda": 3, "cpu": 1}  # requests of a stream, one after another


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
class Heard:
    """A request: seconds to its first audio, of its audio, and by how many of these any of it came too late."""

    first: float
    audio: float
    late: float


def concurrent(tts: Synthesizer, manner: Manner, counts: Sequence[int], rounds: int, say: Say) -> list[Streams]:
    """`rounds` requests of each stream, behind a warm-up. Nothing else may use the engine meanwhile."""
    rows = min(max(counts), rows_for(tts.engine))
    found = []
    with ThreadPoolExecutor(max(counts), "stream") as pool, closing(InFlight(tts, rows=rows)) as batch:
        say("streams, to warm up")
        batch.warm_up(WORDS)
        for count in counts:
            say(f"streams, {count} at once")
            started = time.perf_counter()
            asked = [pool.submit(_ask, batch, manner, index * rounds, rounds) for index in range(count)]
            heard = [request for stream in asked for request in stream.result()]
            passed = time.perf_counter() - started
            first = sorted(request.first for request in heard)
            found.append(
                Streams(
                    streams=count,
                    rows=rows,
                    requests=len(heard),
                    audio_seconds_per_second=sum(request.audio for request in heard) / passed,
                    first_audio_seconds_p50=statistics.median(first),
                    first_audio_seconds_p95=first[min(int(0.95 * len(first)), len(first) - 1)],
                    interrupted=sum(request.late > 0 for request in heard),
                )
            )
    return found


def _ask(batch: InFlight, manner: Manner, seed: int, rounds: int) -> list[Heard]:
    heard = []
    for turn in range(rounds):
        started, first, late, audio = time.perf_counter(), 0.0, 0.0, 0.0
        options: dict[str, Any] = {"voice": manner.voice, "steps": manner.steps, "seed": seed + turn}
        for chunk in batch.stream(WORDS, **options):
            came = time.perf_counter() - started
            first = first or came
            late = max(late, came - first - audio)
            audio += len(chunk.samples) / batch.tts.sample_rate
        heard.append(Heard(first, audio, late))
    return heard
