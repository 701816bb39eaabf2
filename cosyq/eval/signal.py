"""What is heard without understanding a word: clicks and pauses, of the samples alone."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

BLOCK = 0.001  # seconds: a click is shorter
NEAR = 20  # blocks to either side, more than a pitch period: the closures of a voice come in rows
CLICK_RATIO = 4.0  # in 155 s of cosyq-mini's speech nothing reaches it; docs/decisions.md has what it finds
CLICK_FLOOR = 3e-3  # of full scale, -50 dB

FRAME = 0.005  # seconds
LOUD = 95  # percentile of the frames' levels
SILENT = -40.0  # dB, beside the loud ones
FLOOR = -60.0  # dB of full scale, silent whatever is beside it


def clicks(samples: NDArray[np.float32], rate: int) -> int:
    """How many clicks there are: jumps, `CLICK_RATIO` times as large as any within 20 ms of them.

    Sought in the second difference, the residual of a fixed linear prediction of order two; after Vaseghi and Rayner,
    Detection and suppression of impulsive noise in speech communication systems (IEE Proceedings I, 1990), who fit the
    predictor and compare with the residual's spread. Here the largest neighbour is the scale: a voiced residual is
    itself made of pulses, and its spread would take each of them for a click.

    Args:
        samples: [n] in -1..1.
    """
    size = round(BLOCK * rate)
    jumps = np.abs(np.diff(samples.astype(np.float64), 2))
    count = len(jumps) // size
    if not count:
        return 0
    largest = jumps[: count * size].reshape(count, size).max(1)
    around = sliding_window_view(np.pad(largest, NEAR), 2 * NEAR + 1)  # [count, ...], itself in the middle
    itself = around[:, NEAR - 1 : NEAR + 2].max(1)  # with the blocks beside it, which it may reach into
    others = np.maximum(around[:, : NEAR - 1].max(1), around[:, NEAR + 2 :].max(1))
    return int(((largest == itself) & (largest > np.maximum(CLICK_RATIO * others, CLICK_FLOOR))).sum())


def pauses(samples: NDArray[np.float32], rate: int) -> tuple[float, float]:
    """Seconds of silence between the first and the last sound, and seconds from the one to the other.

    A frame of 5 ms is silent that is 40 dB below the loud ones (the 95th percentile), or below -60 dB of full scale.
    Speech without any sound has a span of 0.

    Args:
        samples: [n] in -1..1.
    """
    size = round(FRAME * rate)
    count = len(samples) // size
    power = np.square(samples[: count * size].astype(np.float64)).reshape(count, size).mean(1)
    level = 10 * np.log10(np.maximum(power, 1e-12))
    threshold = max(np.percentile(level, LOUD) + SILENT, FLOOR) if count else FLOOR
    sounding = np.flatnonzero(level > threshold)
    if not len(sounding):
        return 0.0, 0.0
    span = int(sounding[-1] - sounding[0]) + 1
    return (span - len(sounding)) * size / rate, span * size / rate
