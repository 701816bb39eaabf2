"""What the model says to be tuned on: of our own writing, and none of what an evaluation reads."""

from __future__ import annotations

from pathlib import Path


def sentences(count: int, *, bundled: bool) -> list[str]:
    """At most `count`, for a model that reads English and Mandarin in turns; cosyq-mini, `bundled`, reads English."""
    lists = [_lines(language) for language in (("en",) if bundled else ("en", "zh"))]
    return [text for texts in zip(*lists, strict=True) for text in texts][:count]


def _lines(language: str) -> list[str]:
    return (Path(__file__).parent / "texts" / f"{language}.txt").read_text("utf-8").splitlines()
