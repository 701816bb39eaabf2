"""What an artifact may take: megabytes in all, or bits for each weight of a matrix."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from cosyq.errors import UsageError

UNITS: dict[str, Literal["MB", "GB", "bpw"]] = {"mb": "MB", "gb": "GB", "bpw": "bpw"}
BYTES = {"MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Budget:
    """`text` as given: a number of decimal MB or GB, as `cosyq quantize --dry-run` counts them, or of bits a weight."""

    number: float
    unit: Literal["MB", "GB", "bpw"]

    def __str__(self) -> str:
        return f"{self.number:.12g}{self.unit}"

    def limit(self, rest: int, weights: int) -> int:
        """In bytes of an artifact, whose matrices have so many weights, and in which all else takes `rest`."""
        if self.unit == "bpw":
            return rest + int(self.number * weights / 8)
        return round(self.number * BYTES[self.unit])


def parse_budget(text: str) -> Budget:
    """ "600MB", "0.6GB" or "4.5bpw".

    Raises:
        UsageError: it is none of those.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?(MB|GB|bpw)", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise UsageError(f"not a budget: {text!r:.40}", where="--budget", remedy="give one such as 600MB or 4.5bpw")
    return Budget(float(match[1]), UNITS[match[2].lower()])
