"""docs/numbers.svg from the first table of docs/numbers.md: `python docs/plot.py`.

The table's first column names the rows, each other column becomes a panel of bars. A cell is a number, a range
"a to b", of which the paler end of the bar is the spread, or anything else, which is written where the bar would be.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
NUMBERS, PLOT = HERE / "numbers.md", HERE / "numbers.svg"
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
LABELS, PANEL, BAR, ROW, HEAD, GAP = 90, 190, 110, 26, 38, 8  # pixels
STYLE = (
    "text{font:12px sans-serif;fill:#57606a}.title{font-weight:bold}.bar{fill:#0969da}.spread{fill:#0969da;opacity:.4}"
    "@media(prefers-color-scheme:dark){text{fill:#9ba3ab}.bar,.spread{fill:#58a6ff}}"
)


def first_table(text: str) -> list[list[str]]:
    """The cells of the first table of a Markdown text, its header first."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.M)
    if lines is None:
        raise ValueError("there is no table")
    rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines[0].splitlines()]
    return [rows[0], *rows[2:]]


def value(cell: str) -> tuple[float, float] | None:
    """What a cell says as a range, None where it is no figure."""
    found = [float(number.replace(",", "")) for number in NUMBER.findall(cell)]
    if not cell[:1].isdigit() or len(found) not in (1, 2):
        return None
    return found[0], found[-1]


def panel(title: str, cells: list[str], left: int) -> list[str]:
    values = [value(cell) for cell in cells]
    longest = max((high for found in values if found for high in found), default=1.0)
    parts = [f'<text class="title" x="{left}" y="20">{escape(title)}</text>']
    for index, (cell, found) in enumerate(zip(cells, values, strict=True)):
        top, end = HEAD + ROW * index, left
        if found:
            low, high = (BAR * number / longest for number in found)
            end = left + round(high) + 6
            parts.append(f'<rect class="bar" x="{left}" y="{top}" width="{low:.1f}" height="{ROW - 10}"/>')
            if high > low:
                spread = f'x="{left + low:.1f}" y="{top}" width="{high - low:.1f}" height="{ROW - 10}"'
                parts.append(f'<rect class="spread" {spread}/>')
        parts.append(f'<text x="{end}" y="{top + 13}">{escape(cell)}</text>')
    return parts


def draw(rows: list[list[str]]) -> str:
    """The table as SVG text."""
    header, body = rows[0], rows[1:]
    width, height = LABELS + PANEL * (len(header) - 1) + GAP, HEAD + ROW * len(body) + GAP
    parts = [f'<text x="0" y="{HEAD + ROW * i + 13}">{escape(row[0])}</text>' for i, row in enumerate(body)]
    for column, title in enumerate(header[1:], 1):
        parts += panel(title, [row[column] for row in body], LABELS + PANEL * (column - 1))
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">'
    return "\n".join([opening, f"<style>{STYLE}</style>", *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    PLOT.write_text(draw(first_table(NUMBERS.read_text("utf-8"))), "utf-8")
