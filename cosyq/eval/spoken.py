"""Two models at the same texts with ids of their own, heard by judges that know nothing of either.

Both draw from the same seeds; what they draw differs from the first id on that quantization changed, so these metrics
have chance in them, and the exact ones say more at fewer utterances. What only these see is what came of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cosyq.eval import metrics
from cosyq.eval.evaluation import Compared, Rendition
from cosyq.eval.likeness import Vector, direction, distance
from cosyq.eval.metric import Metric, Series
from cosyq.eval.recognizers import Recognizer
from cosyq.eval.scoring import BY_WORDS, Scoring, score
from cosyq.eval.signal import clicks, pauses
from cosyq.runtime.synthesizer import Synthesizer
from cosyq.sequences import Progress
from cosyq.text.normalize import language_of
from cosyq.voices.voice import Voice

SOUNDS = 24  # utterances whose samples are kept, the worst: a long list's would fill the memory

Samples = NDArray[np.float32]


class Voices(Protocol):
    """A sequence of voices, or one that makes each when it is asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Voice: ...


@dataclass(frozen=True)
class Judges:
    """Who listens; None where there is nobody, and what only they could say is left out.

    recognizer: writes down what it hears.
    opinion: samples [n] and their rate -> predicted mean opinion score, None of too few samples.
    likeness: the same -> direction of the speaker vector.
    language: of all texts, a code of two letters; None is en or zh, by a text's letters, and unknown otherwise.
    scoring: how errors are counted.
    """

    recognizer: Recognizer | None = None
    opinion: Callable[[Samples, int], float | None] | None = None
    likeness: Callable[[Samples, int], Vector | None] | None = None
    language: str | None = None
    scoring: Scoring = BY_WORDS


@dataclass(frozen=True)
class Mark:
    """What one side of an utterance adds to a metric: a total over a weight."""

    total: float
    weight: float = 1.0


@dataclass(frozen=True)
class Judged:
    """An utterance as the judges heard it.

    marks: by the key of every metric that could be told.
    speaker: direction of its speaker vector.
    """

    samples: Samples
    finish: str
    marks: dict[str, Mark]
    understood: str | None = None
    speaker: Vector | None = None

    def rendition(self) -> Rendition:
        values = {key: mark.total / mark.weight for key, mark in self.marks.items() if mark.weight > 0}
        return Rendition(values, self.samples, self.understood, self.finish)


def speak_both(
    candidate: Synthesizer,
    reference: Synthesizer,
    texts: Sequence[str],
    voices: Voices,
    *,
    seed: int,
    judges: Judges,
    progress: Progress,
) -> tuple[list[Series], tuple[Compared, ...]]:
    """Say every text with both, the voices taking turns, text `i` from seed `seed + i`, and judge what is heard.

    Series are in the order of `metrics.SPOKEN`; one that no utterance says anything of is left out. Samples are kept
    of the worst `SOUNDS` utterances.

    Raises:
        UsageError: a text or a voice is not usable, or the recognizer is not.
        DeviceError: the device ran out of memory or of finite numbers.
    """
    sides: list[tuple[dict[str, Mark], dict[str, Mark]]] = []
    compared: list[Compared] = []
    for index, text in enumerate(texts):
        voice = voices[index % len(voices)]
        heard = []
        for side, speaker in (("artifact", candidate), ("reference", reference)):
            progress(f"{side} says, judges listen", index, len(texts))
            audio = speaker.synthesize(text, voice=voice, seed=seed + index)
            heard.append(hear(text, audio.samples, audio.sample_rate, audio.timings.finish, voice, judges))
        mine, other = heard
        if mine.speaker is not None and other.speaker is not None:
            mine.marks[metrics.TIMBRE.key] = Mark(distance(mine.speaker, other.speaker))
        sides.append((mine.marks, other.marks))
        compared.append(Compared(text, voice.name, seed + index, mine.rendition(), other.rendition()))
        compared = _quieter(compared)
    progress("artifact says, judges listen", len(texts), len(texts))
    found = (_series(metric, sides) for metric in metrics.SPOKEN)
    return [series for series in found if series is not None], tuple(compared)


def hear(text: str, samples: Samples, rate: int, finish: str, voice: Voice | None, judges: Judges) -> Judged:
    """What can be told of [n] samples in -1..1 that should say `text`; `voice` is whose they should be.

    Raises:
        UsageError: the recognizer is not usable.
    """
    silent, span = pauses(samples, rate)
    marks = {
        metrics.DURATION.key: Mark(len(samples) / rate),
        metrics.RUNAWAY.key: Mark(100.0 * (finish == "length")),
        metrics.CLICKS.key: Mark(clicks(samples, rate), len(samples) / rate / 60),
        metrics.SILENCE.key: Mark(100 * silent, span),
    }
    understood = speaker = None
    if judges.recognizer is not None:
        language = judges.language or language_of(text)
        understood = judges.recognizer(samples, rate, language if language not in ("", "other") else None)
        found = score(text, understood, judges.scoring)
        if found.units:
            rate_of_errors = Mark(100.0 * found.errors, found.units)
            alike = Mark(100.0 * found.errors / found.units)
            marks[metrics.ERRORS.key] = alike if judges.scoring.alike else rate_of_errors
            marks[metrics.TRUNCATED.key] = Mark(100.0 * found.truncated)
    if judges.opinion is not None and (opinion := judges.opinion(samples, rate)) is not None:
        marks[metrics.MOS.key] = Mark(opinion)
    if judges.likeness is not None:
        speaker = judges.likeness(samples, rate)
        own = direction(voice.speaker.numpy()) if voice is not None else None
        if speaker is not None and own is not None:
            marks[metrics.SIMILARITY.key] = Mark(float(speaker @ own))
    return Judged(samples, finish, marks, understood, speaker)


def _series(metric: Metric, sides: Sequence[tuple[dict[str, Mark], dict[str, Mark]]]) -> Series | None:
    """Over the utterances that tell of it on both sides, or on the artifact's of a distance."""
    alone = metric is metrics.TIMBRE
    told = [pair for pair in sides if all(metric.key in marks for marks in pair[: 1 if alone else 2])]
    columns = [
        np.array([getattr(pair[side][metric.key], field) for pair in told], np.float64)
        for side in range(1 if alone else 2)
        for field in ("total", "weight")
    ]
    if not told or any(weights.sum() <= 0 for weights in columns[1::2]):
        return None
    return Series(metric, *columns)


def _quieter(compared: list[Compared]) -> list[Compared]:
    """All of them, samples in the worst `SOUNDS` alone."""
    sounding = [item for item in compared if item.artifact.samples is not None]
    if len(sounding) <= SOUNDS:
        return compared
    least = min(sounding, key=worse_by)
    silent = [replace(side, samples=None) for side in (least.artifact, least.reference)]
    return [replace(least, artifact=silent[0], reference=silent[1]) if item is least else item for item in compared]


def worse_by(item: Compared) -> tuple[float, ...]:
    """How much worse the artifact did: by errors, then by opinion, then by timbre, as far as there are any."""

    def lost(metric: Metric) -> float:
        mine, other = (side.values.get(metric.key, 0.0) for side in (item.artifact, item.reference))
        found = other - mine if metric.better == "higher" else mine - other
        return found if math.isfinite(found) else math.inf

    return tuple(map(lost, (metrics.RUNAWAY, metrics.ERRORS, metrics.MOS, metrics.TIMBRE)))
