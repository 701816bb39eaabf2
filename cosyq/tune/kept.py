"""Costs as they are measured, kept in a file: whoever is interrupted goes on, and another budget measures nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from cosyq.errors import ArtifactError
from cosyq.files import whole_file
from cosyq.quantize.formats import Format

MAX_BYTES = 64 << 20


class Costs:
    """What storing a unit in a format costs, for one origin: a digest of all that decides it.

    Raises:
        ArtifactError: the file is damaged, or of another origin.
    """

    def __init__(self, path: Path, origin: str):
        self.path, self.origin = path, origin
        self._found = _read(path, origin) if path.exists() else {}

    def __contains__(self, key: tuple[str, Format]) -> bool:
        unit, fmt = key
        return str(fmt) in self._found.get(unit, {})

    def __getitem__(self, key: tuple[str, Format]) -> float:
        unit, fmt = key
        return self._found[unit][str(fmt)]

    def put(self, unit: str, fmt: Format, cost: float) -> None:
        """Raises ArtifactError where it cannot be written."""
        self._found.setdefault(unit, {})[str(fmt)] = cost
        with whole_file(self.path) as partial:
            partial.write_text(json.dumps({"origin": self.origin, "costs": self._found}, indent=1) + "\n", "utf-8")


def _read(path: Path, origin: str) -> dict[str, dict[str, float]]:
    remedy = "remove it, and they are measured again"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        data: Any = json.loads(path.read_text("utf-8"))
        if data["origin"] != origin:
            raise ArtifactError("holds what was measured of another model or otherwise", where=path, remedy=remedy)
        costs = data["costs"]
        for unit in costs.values():
            for cost in unit.values():
                if type(cost) not in (int, float) or not math.isfinite(cost) or cost < 0:
                    raise ValueError(f"a cost is {cost!r:.40}")
        return {str(name): dict(unit) for name, unit in costs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"not kept costs ({error})", where=path, remedy=remedy) from None
