"""Whose voice it is: the checkpoint's own speaker encoder (CAM++), as it enrols voices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cosyq.audio.features import SPEECH_RATE
from cosyq.audio.recording import Recording
from cosyq.voices.enrol import SPEAKER_ENCODER, SpeakerEncoder

SHORTEST = 0.5  # seconds: of less the vector says little

Vector = NDArray[np.float64]


class Likeness:
    """name: for a report.

    Raises:
        CheckpointError: `folder` lacks the speaker encoder, or its file is damaged.
    """

    name = SPEAKER_ENCODER

    def __init__(self, folder: Path):
        self._encoder = SpeakerEncoder(folder)

    def __call__(self, samples: NDArray[np.float32], rate: int) -> Vector | None:
        """The direction of the speaker vector, [speaker_dim] of length 1; None where there are too few samples."""
        if len(samples) < SHORTEST * rate:
            return None
        return direction(self._encoder(torch.from_numpy(Recording(samples, rate).at(SPEECH_RATE))).numpy())


def direction(vector: NDArray[np.float32]) -> Vector | None:
    """[n] -> [n] of length 1; None of a vector that has none, such as the neutral voice's."""
    exact = vector.astype(np.float64)
    length = float(np.sqrt(exact @ exact))
    return exact / length if np.isfinite(length) and length > 0 else None


def distance(one: Vector, other: Vector) -> float:
    """One less the cosine of two directions, and exactly 0 of a direction from itself."""
    return float(np.square(one - other).sum() / 2)
