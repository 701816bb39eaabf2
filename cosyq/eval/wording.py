"""How a finding is said: numbers as exact as their interval, and what a difference amounts to."""

from __future__ import annotations

import math
from typing import Literal

from cosyq.eval.metric import Finding, Interval, Metric

Verdict = Literal["gained", "held", "lost", "open"]
MEANING: dict[Verdict, str] = {
    "gained": "better by more than the claim",
    "held": "no loss beyond the claim",
    "lost": "worse by more than the claim",
    "open": "undecided: the interval has both",
}


def harm(metric: Metric, difference: Interval) -> tuple[float, float]:
    """The bounds of a difference, turned so that more is worse: (at best, at worst)."""
    low, high = difference.low, difference.high
    if metric.better == "lower":
        return low, high
    if metric.better == "higher":
        return -high, -low
    nearest = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    return nearest, math.nan if math.isnan(low + high) else max(abs(low), abs(high))


def verdict(finding: Finding) -> Verdict:
    """What the whole interval of the difference says beside the claim; of one item, nothing."""
    best, worst = harm(finding.metric, finding.difference)
    if finding.needed is None or math.isnan(best + worst):
        return "open"
    if worst < -finding.metric.claim:
        return "gained"
    if worst <= finding.metric.claim:
        return "held"
    return "lost" if best > finding.metric.claim else "open"


def title(metric: Metric) -> str:
    return f"{metric.title}, {metric.unit}" if metric.unit else metric.title


def written(interval: Interval, *, signed: bool = False) -> str:
    """`value [low, high]`, as `parted` gives them."""
    return " ".join(parted(interval, signed=signed)).strip()


def parted(interval: Interval, *, signed: bool = False) -> tuple[str, str]:
    """The value and `[low, high]`, in two digits of the interval's half width; without a width, in three of its own."""
    numbers = [interval.value, interval.low, interval.high]
    if not all(map(math.isfinite, numbers)):
        return "not finite", ""
    half = (interval.high - interval.low) / 2
    sign = "+" if signed else ""
    if half == 0:
        return f"{interval.value:{sign if interval.value else ''}.3g}", ""
    largest = max(map(abs, numbers))
    places = 1 - math.floor(math.log10(half))
    if largest < 1e-4:
        places += math.floor(math.log10(largest))
        kind = f"{sign}.{max(places, 0)}e"
    else:
        numbers = [round(number, places) + 0.0 for number in numbers]  # -0.0 and 0 are one
        kind = f"{sign},.{max(places, 0)}f"
    value, low, high = (f"{number:{kind}}" for number in numbers)
    return value, f"[{low}, {high}]"
