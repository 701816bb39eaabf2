"""The sentences that an evaluation reads where a user names no others: everyday language, of our own writing."""

from __future__ import annotations

from pathlib import Path

from cosyq.errors import UsageError

LANGUAGES = ("en", "zh")


def sentences(language: str) -> list[str]:
    """Of one of `LANGUAGES`, short ones and long ones in turns; cosyq-mini was trained on none of them."""
    return (Path(__file__).parent / "texts" / f"{language}.txt").read_text("utf-8").splitlines()


def own_texts(bundled: str | None, language: str | None) -> list[str]:
    """Those in the languages that a model reads, `bundled` by name or the published one, or in one of them.

    Raises:
        UsageError: there are none in `language`.
    """
    if language not in (*LANGUAGES, None):
        raise UsageError("cosyq has no texts in it", where=f"--language {language}", remedy="give yours with --texts")
    names = (language,) if language else ("en",) if bundled else LANGUAGES
    return [text for name in names for text in sentences(name)]


def spread(texts: list[str], limit: int | None) -> list[str]:
    """At most `limit` of the texts, from all of the list."""
    if limit is None or limit >= len(texts):
        return texts
    return [texts[index * len(texts) // limit] for index in range(limit)]
