"""The one place that imports wetext, when a text first needs it: it takes half a second and holds 45 MB of grammars.

It is asked for single spans in a form that it is known to read well ("345", "2024年10月25日"), never for a sentence:
given plain words, it lower-cases months, escapes quotation marks and reads "No." as "number".
"""

from __future__ import annotations

from functools import cache, lru_cache
from importlib import metadata
from typing import Any, Literal

from cosyq.errors import UsageError

Language = Literal["en", "zh"]


def engine_name() -> str:
    """What reads numbers, with its version, as a result names it: "wetext 0.1.8"."""
    try:
        return f"wetext {metadata.version('wetext')}"
    except metadata.PackageNotFoundError:
        return "wetext, not installed"


@lru_cache(maxsize=4096)
def say(language: Language, written: str) -> str:
    """A span of digits and symbols in words.

    Raises:
        UsageError: wetext cannot be imported. No other engine takes its place.
    """
    return _normalizer(language).normalize(written)


@lru_cache(maxsize=4096)
def simplified(character: str) -> str:
    """A Chinese character as simplified script writes it, whatever stands beside it.

    Raises:
        UsageError: wetext cannot be imported.
    """
    return _normalizer("zh").normalize(character, traditional_to_simple=True)


@cache
def _normalizer(language: Language) -> Any:
    try:
        from wetext import Normalizer
    except ImportError as error:
        remedy = "pip install wetext, or --no-normalize (normalize=False) with every number in words"
        raise UsageError(f"wetext cannot be imported ({error})", where="normalization", remedy=remedy) from None
    return Normalizer(lang=language, operator="tn")
