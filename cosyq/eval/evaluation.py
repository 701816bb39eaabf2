"""What an evaluation found, as a value: the table, the modules' errors, and the utterances with their sound."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cosyq.eval.metric import Finding


@dataclass(frozen=True)
class Rendition:
    """One side's way of saying an utterance.

    values: by metric key, what it adds to the metric's mean.
    samples: [n] float32 at the model's rate; None where it was not spoken.
    understood: what a recognizer wrote down.
    finish: "stop" or "length".
    """

    values: dict[str, float]
    samples: NDArray[np.float32] | None = None
    understood: str | None = None
    finish: str | None = None


@dataclass(frozen=True)
class Compared:
    """One utterance on both sides; of a distance, only the artifact's side has a value."""

    text: str
    voice: str
    seed: int
    artifact: Rendition
    reference: Rendition


@dataclass(frozen=True)
class Evaluation:
    """All that was found of an artifact beside a reference.

    about: what was measured, with what, on what and when, in a sentence or two.
    modules: name, format, bytes and relative RMS error, as the manifest has them.
    """

    artifact: str
    against: str
    about: str
    sample_rate: int
    findings: tuple[Finding, ...]
    modules: tuple[tuple[str, str, int, float], ...]
    exact: tuple[Compared, ...] = ()  # of the reference's own ids
    spoken: tuple[Compared, ...] = ()  # with ids of their own
    extra: dict[str, str] = field(default_factory=dict)  # recognizer, MOS predictor, their versions
    files: dict[str, str] = field(default_factory=dict)  # sha256 of the artifact's stage files: what was measured
