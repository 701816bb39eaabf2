"""Two models at the same texts with ids of their own, heard by judges that know nothing of either.

Both draw from the same seeds; what they draw differs from the first id on that quantization changed, so these metrics
have chance in them, and the exact ones say more at fewer utterances. What only these see is what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cosyq.errors import UsageError
from cosyq.eval import metrics
from cosyq.eval.evaluation import Compared, Rendition
from cosyq.eval.likeness import Likeness, Vector, direction, distance
from cosyq.eval.metric import Metric, Series
from cosyq.eval.opinion import Opinion
from cosyq.eval.recognizers import Recognizer
from cosyq.eval.scoring import BY_WORDS, Scoring, score
from cosyq.eval.signal import clicks, pauses
from cosyq.runtime.synthesizer import Synthesizer
from cosyq.sequences import Progress
from cosyq.text.normalize import language_of
from cosyq.voices.voice import Voice

HELD = 256  # utterances whose samples are kept while the other side speaks, the first: a list has thousands
SOUNDS = 24  # of them that are kept for good, the worst

Samples = NDArray[np.float32]


class Voices(Protocol):
    """A sequence of voices, or one that makes each when it is asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Voice: ...


@dataclass(frozen=True)
class Judges:
    """Who listens; None where there is nobody, and what only they could say is left out.

    recognizer: writes down what it hears.
    opinion: predicts what listeners would think of it.
    likeness: knows the speaker.
    language: of all texts, a code of two letters; None is en or zh, by a text's letters, and unknown otherwise.
    scoring: how errors are counted.
    """

    recognizer: Recognizer | None = None
    opinion: Opinion | None = None
    likeness: Likeness | None = None
    language: str | None = None
    scoring: Scoring = BY_WORDS

    def language_of(self, text: str) -> str | None:
        if self.language is not None:
            return self.language
        found = language_of(text)
        return found if found in ("en", "zh") else None

    def check(self, texts: Iterable[str]) -> None:
        """Before minutes go into speech that the recognizer could not judge.

        Raises:
            UsageError: it does not know the language of a text.
        """
        known = self.recognizer.languages if self.recognizer is not None else None
        for text in texts:
            if known is not None and (language := self.language_of(text)) not in (*known, None):
                remedy = "name another recognizer, or texts of that language alone"
                where = f"{self.recognizer.name}: {text:.40}" if self.recognizer is not None else text
                raise UsageError(f"knows {', '.join(known)} and not {language}", where=where, remedy=remedy)

    @property
    def names(self) -> dict[str, str]:
        """Who they are, for a report."""
        seats = {"recognizer": self.recognizer, "opinion": self.opinion, "likeness": self.likeness}
        return {seat: judge.name for seat, judge in seats.items() if judge is not None}


@dataclass(frozen=True)
class Aloud:
    """What both say by themselves, the voices taking turns, and who listens."""

    texts: Sequence[str]
    voices: Voices
    judges: Judges


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

    voice: str
    samples: Samples | None
    finish: str
    marks: dict[str, Mark]
    understood: str | None = None
    speaker: Vector | None = None

    def rendition(self) -> Rendition:
        values = {key: mark.total / mark.weight for key, mark in self.marks.items() if mark.weight > 0}
        return Rendition(values, self.samples, self.understood, self.finish)


def speak_both(
    artifact: Callable[[], Synthesizer],
    reference: Callable[[], Synthesizer],
    aloud: Aloud,
    *,
    seed: int,
    progress: Progress,
) -> tuple[list[Series], tuple[Compared, ...]]:
    """Say every text with both, text `i` from seed `seed + i`, and judge what is heard.

    Series are in the order of `metrics.SPOKEN`; one that no utterance says anything of is left out.

    Args:
        artifact, reference: load a side; there is one in memory at a time.

    Raises:
        UsageError: a text or a voice is not usable, or the recognizer is not.
        DeviceError: the device ran out of memory or of finite numbers.
    """
    aloud.judges.check(aloud.texts)
    mine = _speak("artifact", artifact(), aloud, seed, progress)
    other = _speak("reference", reference(), aloud, seed, progress)
    compared = []
    for index, (one, two) in enumerate(zip(mine, other, strict=True)):
        if one.speaker is not None and two.speaker is not None:
            one.marks[metrics.TIMBRE.key] = Mark(distance(one.speaker, two.speaker))
        compared.append(Compared(aloud.texts[index], one.voice, seed + index, one.rendition(), two.rendition()))
    found = (series_of(m, [mine] if m is metrics.TIMBRE else [mine, other]) for m in metrics.SPOKEN)
    return [series for series in found if series is not None], _quieter(compared)


def _speak(side: str, synthesizer: Synthesizer, aloud: Aloud, seed: int, progress: Progress) -> list[Judged]:
    judged = []
    for index, text in enumerate(aloud.texts):
        progress(f"{side} speaks, judges listen", index, len(aloud.texts))
        voice = aloud.voices[index % len(aloud.voices)]
        audio = synthesizer.synthesize(text, voice=voice, seed=seed + index)
        heard = hear(text, audio.samples, audio.sample_rate, audio.timings.finish, voice, aloud.judges)
        judged.append(heard if index < HELD else replace(heard, samples=None))
    progress(f"{side} speaks, judges listen", len(aloud.texts), len(aloud.texts))
    return judged


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
        language = judges.language_of(text)
        understood = judges.recognizer(samples, rate, language)
        found = score(text, understood, language, judges.scoring)
        if found.units:
            weight = 1 if judges.scoring.alike else found.units
            marks[metrics.ERRORS.key] = Mark(100 * found.errors / found.units * weight, weight)
            marks[metrics.TRUNCATED.key] = Mark(100.0 * found.truncated)
    if judges.opinion is not None and (opinion := judges.opinion(samples, rate)) is not None:
        marks[metrics.MOS.key] = Mark(opinion)
    if judges.likeness is not None:
        speaker = judges.likeness(samples, rate)
        own = direction(voice.speaker.numpy()) if voice is not None else None
        if speaker is not None and own is not None:
            marks[metrics.SIMILARITY.key] = Mark(float(speaker @ own))
    return Judged(voice.name if voice is not None else "", samples, finish, marks, understood, speaker)


def series_of(metric: Metric, sides: Sequence[Sequence[Judged]]) -> Series | None:
    """A metric over the utterances that tell of it on every side, the artifact's and, if any, the reference's."""
    told = [pair for pair in zip(*sides, strict=True) if all(metric.key in judged.marks for judged in pair)]
    columns = [
        np.array([getattr(pair[side].marks[metric.key], field) for pair in told], np.float64)
        for side in range(len(sides))
        for field in ("total", "weight")
    ]
    if any(weights.sum() <= 0 for weights in columns[1::2]):
        return None
    return Series(metric, *columns)


def _quieter(compared: list[Compared]) -> tuple[Compared, ...]:
    """All of them, with samples of the worst that have any."""
    sounding = [item for item in compared if item.artifact.samples is not None]
    loud = set(map(id, sorted(sounding, key=worse_by, reverse=True)[:SOUNDS]))
    return tuple(item if id(item) in loud else _silent(item) for item in compared)


def _silent(item: Compared) -> Compared:
    artifact, reference = (replace(side, samples=None) for side in (item.artifact, item.reference))
    return replace(item, artifact=artifact, reference=reference)


def worse_by(item: Compared) -> tuple[float, ...]:
    """How much worse the artifact did: runaway, then by errors, by opinion and by timbre, as far as there are any."""

    def lost(metric: Metric) -> float:
        mine, other = (side.values.get(metric.key, 0.0) for side in (item.artifact, item.reference))
        return other - mine if metric.better == "higher" else mine - other

    return tuple(map(lost, (metrics.RUNAWAY, metrics.ERRORS, metrics.MOS, metrics.TIMBRE)))
