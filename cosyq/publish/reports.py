"""What was measured of an artifact, as tables that lie beside its manifest and go into its card."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cosyq.errors import ArtifactError

if TYPE_CHECKING:  # the command line reads names of files here, before torch
    from cosyq.artifact.manifest import Manifest

EVAL_FILE, BENCH_FILE = "eval.json", "bench.json"
REPORT_FILES = (EVAL_FILE, BENCH_FILE)  # quality, speed
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Report:
    """A table, and in a sentence what was measured, with what, on what and when.

    measured: sha256 of the stage files that it is about, by name; empty where it does not say.
    """

    about: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    measured: dict[str, str] = field(default_factory=dict)


def read_report(path: Path) -> Report:
    """Read `{"about": text, "columns": [text], "rows": [[text or number]]}`, and `measured`, `{file: sha256}`.

    Other keys are not looked at.

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
        measured = {name: _text(sha256) for name, sha256 in data.get("measured", {}).items()}
        return Report(_text(data["about"]), columns, rows, measured)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"not a report ({error})", where=path, remedy="write it again, or take it out") from None


def check_measured(report: Report, manifest: Manifest, where: Path) -> None:
    """Raises ArtifactError when a report says that it is about weights other than the manifest's.

    Voices may have come or gone since: they are no part of what is compared.
    """
    held = {name: record.sha256 for name, record in manifest.files.items()}
    if others := sorted(name for name, sha256 in report.measured.items() if held.get(name) != sha256):
        raise ArtifactError(
            f"was measured on other weights than these ({', '.join(others):.200})",
            where=where,
            remedy="measure this artifact, `cosyq eval ARTIFACT --save`, or take the report out",
        )


def _text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"expected text or a number, found {value!r:.80}")
    return str(value)
