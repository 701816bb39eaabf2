"""The sentences that an evaluation reads where a user names no others: everyday language, of our own writing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Language = Literal["en", "zh"]


def sentences(language: Language) -> list[str]:
    """Of one language, short ones and long ones in turns; cosyq-mini was trained on none of them."""
    return (Path(__file__).parent / "texts" / f"{language}.txt").read_text("utf-8").splitlines()


def spread(texts: list[str], limit: int | None) -> list[str]:
    """At most `limit` of the texts, from all of the list."""
    if limit is None or limit >= len(texts):
        return texts
    return [texts[index * len(texts) // limit] for index in range(limit)]
