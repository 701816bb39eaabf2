"""An evaluation as JSON that lies beside its artifact: a table for the model card, and the figures it was made of."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from cosyq.eval.evaluation import Evaluation
from cosyq.eval.metric import Finding, Interval
from cosyq.eval.wording import title, verdict, written
from cosyq.files import whole_file

RECORD_FILE = "eval.json"
COLUMNS = ("measure", "artifact", "reference", "difference", "loss", "items")


def record(evaluation: Evaluation) -> dict[str, Any]:
    """The table that `publish.reports` reads, as `about`, `columns` and `rows`, and beside it all figures unrounded.

    An interval is at 95 % confidence. `measured` has the hashes of the stage files that it is about. The same
    evaluation gives the same record; texts and sound are left out.
    """
    return {
        "about": f"{evaluation.artifact} beside {evaluation.against}: {evaluation.about}",
        "columns": list(COLUMNS),
        "rows": [_row(finding) for finding in evaluation.findings],
        "artifact": evaluation.artifact,
        "against": evaluation.against,
        "measured": dict(sorted(evaluation.files.items())),
        "findings": [_finding(finding) for finding in evaluation.findings],
        "modules": [
            {"name": name, "format": fmt, "bytes": size, "rms_error": _number(error)}
            for name, fmt, size, error in evaluation.modules
        ],
        "extra": dict(sorted(evaluation.extra.items())),
    }


def write_record(path: Path, evaluation: Evaluation) -> None:
    """Raises ArtifactError when it cannot be written."""
    text = json.dumps(record(evaluation), ensure_ascii=False, allow_nan=False, indent=1)
    with whole_file(path) as partial:
        partial.write_text(text + "\n", "utf-8")


def _row(finding: Finding) -> list[str]:
    reference = finding.reference
    return [
        f"{title(finding.metric)} ({finding.metric.key})",
        written(finding.artifact),
        "" if reference is None else written(reference),
        "" if reference is None else written(finding.difference, signed=True),
        verdict(finding),
        str(finding.items),
    ]


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "key": finding.metric.key,
        "unit": finding.metric.unit,
        "better": finding.metric.better,
        "claim": finding.metric.claim,
        **_interval(finding.artifact),
        "reference": None if finding.reference is None else _interval(finding.reference),
        "difference": _interval(finding.difference),
        "verdict": verdict(finding),
        "items": finding.items,
        "needed": finding.needed,
    }


def _interval(interval: Interval) -> dict[str, float | None]:
    return {name: _number(getattr(interval, name)) for name in ("value", "low", "high")}


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
