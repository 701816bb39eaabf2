"""What a metric is, what was found of it, and how sure that is.

Items, sentences or sequences, are redrawn with replacement, both sides of one together: a paired bootstrap (Efron and
Tibshirani, An Introduction to the Bootstrap, 1993; for word errors Bisani and Ney, ICASSP 2004).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
CONFIDENCE = 0.95
POWERED = 1.96 + 0.84  # standard errors: found at 95 % confidence, missed in one of five


@dataclass(frozen=True)
class Metric:
    """One row of a report.

    key: how gates and JSON name it, "stage.metric".
    better: which way is good; "near" is the nearer to the reference, whichever way.
    claim: the smallest difference worth speaking of, in the metric's unit.
    """

    key: str
    title: str
    unit: str
    better: Literal["lower", "higher", "near"]
    claim: float


@dataclass(frozen=True)
class Series:
    """What was found, item by item: [n] totals over [n] weights, so that a long item counts for more where it should.

    A rate of word errors has errors over words; a mean over items has weights of one. A distance of the artifact from
    the reference has no reference: it is zero for the reference itself.
    """

    metric: Metric
    artifact: NDArray[np.float64]
    artifact_weights: NDArray[np.float64]
    reference: NDArray[np.float64] | None = None
    reference_weights: NDArray[np.float64] | None = None

    @classmethod
    def of_means(cls, metric: Metric, artifact: list[float], reference: list[float] | None = None) -> Series:
        """Items that count the same."""
        mine = np.array(artifact, dtype=np.float64)
        other = None if reference is None else np.array(reference, dtype=np.float64)
        return cls(metric, mine, np.ones_like(mine), other, None if other is None else np.ones_like(other))


@dataclass(frozen=True)
class Interval:
    """A value and the bounds it lies between at 95 % confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Finding:
    """What a series says.

    reference: None of a distance.
    difference: artifact less reference; of a distance, itself.
    items: how many.
    needed: how many would show a difference of `claim` in four of five cases; None where one item says nothing of it.
    """

    metric: Metric
    artifact: Interval
    reference: Interval | None
    difference: Interval
    items: int
    needed: int | None


def judge(series: Series, *, seed: int = 0) -> Finding:
    """The means of a series, their difference, and 95 % intervals: percentiles of 2,000 paired redraws.

    The same series gives the same finding.

    Raises:
        ValueError: there is no item, the sides do not match, a number is not finite, or no weight is positive.
    """
    count = len(series.artifact)
    sides = [(series.artifact, series.artifact_weights)]
    if (series.reference is None) != (series.reference_weights is None):
        raise ValueError(f"{series.metric.key}: the reference has totals without weights, or weights without totals")
    if series.reference is not None and series.reference_weights is not None:
        sides.append((series.reference, series.reference_weights))
    if count == 0 or any(len(part) != count for side in sides for part in side):
        raise ValueError(f"{series.metric.key}: {count} items on one side, other counts beside them")
    if not all(np.isfinite(part).all() for side in sides for part in side):
        raise ValueError(f"{series.metric.key}: an item is not a finite number")
    if any(weights.sum() <= 0 for _, weights in sides):
        raise ValueError(f"{series.metric.key}: nothing to divide by")
    drawn = np.random.default_rng(seed).integers(0, count, (DRAWS, count))
    means = [totals.sum() / weights.sum() for totals, weights in sides]
    redrawn = [_ratio(totals[drawn].sum(1), weights[drawn].sum(1)) for totals, weights in sides]
    intervals = [_interval(mean, draws) for mean, draws in zip(means, redrawn, strict=True)]
    if len(sides) == 1:
        return Finding(series.metric, intervals[0], None, intervals[0], count, _needed(series, sides, means))
    difference = _interval(means[0] - means[1], redrawn[0] - redrawn[1])
    return Finding(series.metric, intervals[0], intervals[1], difference, count, _needed(series, sides, means))


def _ratio(totals: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """A redraw may hold nothing but items without weight: it says nothing and is left out by its NaN."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(weights > 0, totals / weights, np.nan)


def _interval(mean: float, draws: NDArray[np.float64]) -> Interval:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(draws, [tail, 100 - tail])
    return Interval(float(mean), float(low), float(high))


def _needed(
    series: Series, sides: list[tuple[NDArray[np.float64], NDArray[np.float64]]], means: list[float]
) -> int | None:
    """n = (2.8 s / claim)^2, s the deviation of an item's share of the difference (linearized, as of a ratio)."""
    if len(series.artifact) < 2:
        return None
    shares = [(t - mean * w) / w.mean() for (t, w), mean in zip(sides, means, strict=True)]
    deviation = float(np.std(shares[0] - shares[1] if len(shares) == 2 else shares[0], ddof=1))
    return max(math.ceil((POWERED * deviation / series.metric.claim) ** 2), 1)
