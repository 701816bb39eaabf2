"""The tables of what artifacts lost, for docs/numbers.md, of what `cosyq eval --json` wrote, a row a file:

python docs/quality.py nf4.json int8.json ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TABLES = (
    ("llm.kl", "llm.top1", "llm.nll", "llm.stop"),
    ("flow.lsd", "flow.mcd", "vocoder.stft", "chain.lsd", "chain.stft"),
    ("spoken.errors", "spoken.similarity", "spoken.timbre", "spoken.mos", "spoken.duration"),
    ("spoken.runaway", "spoken.truncated", "spoken.clicks", "spoken.silence"),
)


def cell(finding: Mapping[str, Any]) -> str:
    """The artifact's distance, or how far it is from the reference, and the bounds at 95 %."""
    sign = "-" if finding["reference"] is None else "+"
    value, low, high = (_number(finding["difference"][key], sign) for key in ("value", "low", "high"))
    return value if value == low == high else f"{value} ({low} to {high})"


def _number(value: float, sign: str) -> str:
    return f"{value:{sign}.3g}" if value else "0"


def tables(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables in Markdown, a row for each named report; one is left out if nobody has any of it."""
    parts = []
    for keys in TABLES:
        if not any(key in report["findings"] for report in reports.values() for key in keys):
            continue
        units = {key: finding["unit"] for report in reports.values() for key, finding in report["findings"].items()}
        header = ["", "MB", *(f"{key} ({units[key]})" if units.get(key) else key for key in keys)]
        rows = [
            [
                name,
                f"{report['bytes'] / 1e6:.1f}",
                *(cell(report["findings"][key]) if key in report["findings"] else "" for key in keys),
            ]
            for name, report in reports.items()
        ]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)))
    return "\n\n".join(parts)


if __name__ == "__main__":
    reports = {Path(name).stem: json.loads(Path(name).read_text("utf-8")) for name in sys.argv[1:]}
    sys.stdout.write(tables(reports) + "\n")
