"""Work that is done several times, and what the times say."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch

Say = Callable[[str], None]  # what is being done, for a person who waits
T = TypeVar("T")

# Kernels are compiled, and graphs recorded, in the first runs on a GPU; on a CPU the first run fills caches.
WARM_UPS = {"cuda": 3, "cpu": 1}
RUNS = {"cuda": 7, "cpu": 3}


@dataclass(frozen=True)
class Spread:
    """The median of several runs, and how far they are apart."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Repeat:
    """Does work `runs` times behind `warm_ups`, of which nothing is kept."""

    device: torch.device
    warm_ups: int
    runs: int
    say: Say

    def __call__(self, what: str, work: Callable[[], T]) -> list[T]:
        """What `work` returned in each run."""
        found = []
        for turn in range(self.warm_ups + self.runs):
            self.say(f"{what}, run {turn + 1} of {self.warm_ups + self.runs}")
            found.append(work())
        return found[self.warm_ups :]

    def seconds(self, what: str, work: Callable[[], object]) -> list[float]:
        """How long `work` took in each run, the device's part included."""
        return self(what, lambda: seconds(work, self.device))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a GPU's first call takes it into use."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
