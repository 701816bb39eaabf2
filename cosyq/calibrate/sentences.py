"""What a model is calibrated on the speech of: other sentences than those it is measured with (`eval.sentences`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

Language = Literal["en", "zh"]


def sentences(languages: Sequence[Language], count: int) -> list[str]:
    """So many texts, the languages in turns: each one's sentences, then the first half of one with the second of
    another. A model learns more of its errors from new words than from old ones said again."""
    lists = [_lines(language) for language in languages]
    return [_text(lists[index % len(lists)], index // len(lists)) for index in range(count)]


def _lines(language: Language) -> list[str]:
    return (Path(__file__).parent / "texts" / f"{language}.txt").read_text("utf-8").splitlines()


def _text(lines: list[str], number: int) -> str:
    away, first = divmod(number, len(lines))
    (head, _), (_, tail) = _halves(lines[first]), _halves(lines[(first + away) % len(lines)])
    return head + tail


def _halves(line: str) -> tuple[str, str]:
    """Between words, or anywhere in a script without spaces."""
    middle = len(line) // 2
    at = line.find(" ", middle) if " " in line else middle
    return line[:at], line[at:]
