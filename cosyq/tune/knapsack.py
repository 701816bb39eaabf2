"""One choice for each of many, the least cost within a number of bytes: the multiple-choice knapsack problem.

By dynamic programming over bytes in equal parts (Dudzinski and Walukiewicz, Exact methods for the knapsack problem and
its generalizations, 1987).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PARTS = 1 << 17  # of the bytes between the smallest choices and the largest


@dataclass(frozen=True)
class Option:
    bytes: int
    cost: float


def part(units: Sequence[Sequence[Option]]) -> int:
    """The bytes that an option's excess over its unit's smallest is counted in, rounded up."""
    return max(-(-_span(units) // PARTS), 1)


def allocate(units: Sequence[Sequence[Option]], room: int) -> list[int]:
    """The index of each unit's option: least cost in sum within `room` bytes in sum.

    It costs no more than the best for `room` less one `part` a unit, which is one byte where there are few: then it is
    the best. More room never costs more. Of options that cost the same, the smaller one is taken.

    Raises:
        ValueError: the smallest options do not fit.
    """
    smallest = [min(option.bytes for option in options) for options in units]
    slack = room - sum(smallest)
    if slack < 0:
        raise ValueError(f"the smallest take {sum(smallest)} bytes")
    if slack >= _span(units):
        return [min(range(len(options)), key=lambda i: (options[i].cost, options[i].bytes)) for options in units]
    size = part(units)
    capacity = slack // size
    least = np.zeros(capacity + 1)  # of the units so far, by the parts that they may take
    picks = []
    for options, floor in zip(units, smallest, strict=True):
        before, least = least, np.full(capacity + 1, np.inf)
        pick = np.zeros(capacity + 1, dtype=np.int16)
        for index in sorted(range(len(options)), key=lambda i: (options[i].bytes, options[i].cost)):
            taken = -(-(options[index].bytes - floor) // size)
            if taken <= capacity:
                found = before[: capacity + 1 - taken] + options[index].cost
                better = found < least[taken:]
                least[taken:][better] = found[better]
                pick[taken:][better] = index
        picks.append(pick)
    chosen, left = [], capacity
    for options, floor, pick in reversed(list(zip(units, smallest, picks, strict=True))):
        chosen.append(int(pick[left]))
        left -= -(-(options[chosen[-1]].bytes - floor) // size)
    return chosen[::-1]


def _span(units: Sequence[Sequence[Option]]) -> int:
    """From the smallest options to the largest."""
    return sum(max(o.bytes for o in options) - min(o.bytes for o in options) for options in units)
