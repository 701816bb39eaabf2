"""What was measured of an artifact, as tables that lie beside its manifest and go into its card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cosyq.errors import ArtifactError

EVAL_FILE, BENCH_FILE = "eval.json", "bench.json"
REPORT_FILES = (EVAL_FILE, BENCH_FILE)  # quality, speed
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Report:
    """A table, and in a sentence what was measured, with what, on what and when."""

    about: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def read_report(path: Path) -> Report:
    """Read `{"about": text, "columns": [text], "rows": [[text or number]]}`; other keys are not looked at.

    Raises:
        ArtifactError: it is something else.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        data = json.loads(path.read_text("utf-8"))
        columns = tuple(_text(name) for name in data["columns"])
        rows = tuple(tuple(_text(cell) for cell in row) for row in data["rows"])
        if not columns or any(len(row) != len(columns) for row in rows):
            raise ValueError("every row needs a cell for each column")
        return Report(_text(data["about"]), columns, rows)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"not a report ({error})", where=path, remedy="write it again, or take it out") from None


def _text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"expected text or a number, found {value!r:.80}")
    return str(value)
