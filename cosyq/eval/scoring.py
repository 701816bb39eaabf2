"""Which words of a text a recognizer understood.

A word counts where a script puts spaces between words; a character where it does not (Chinese, Japanese, Korean). A
text of both is counted in both, as a mixed error rate. Text and transcript are made alike first: numbers and symbols
in words (`text.normalize`; in English and Mandarin only), full-width forms and compatibility characters by NFKC, case,
punctuation, apostrophes and the dots of abbreviations (p.m.) dropped, Chinese in simplified script. What is not made
alike counts as an error: contractions (it's, it is), spellings (colour, color), words written together or apart, and
homophones.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cosyq.text.engine import simplified
from cosyq.text.normalize import normalize
from cosyq.text.spans import TAG

_TAG = re.compile(TAG)  # sounds such as [laughter]: a recognizer writes none
_APOSTROPHES = re.compile("['’‘`´]")
_DOTTED = re.compile(r"\b(?:[^\W\d_]\.){2,}|\b[^\W\d_](?:\.[^\W\d_])+\b")
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_HAN_ONE = re.compile(f"[{_HAN}]")
_WIDE = re.compile(f"([{_HAN}\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\uac00-\ud7a3])")  # kana, hangul
LEAST_MISSING = 2  # units: one is lost at an end by a recognizer too, two hardly ever
UNDERSTOOD = 0.5  # of what comes before, for what is missing to be an end


@dataclass(frozen=True)
class Scoring:
    """How errors are counted.

    units: text or transcript, and the text's language -> what is compared.
    alike: every utterance counts the same, whatever its length; else every unit does.
    """

    units: Callable[[str, str | None], list[str]]
    alike: bool = False


@dataclass(frozen=True)
class Score:
    """units: how many the text has; errors: substitutions, deletions and insertions; missing: see `align`."""

    units: int
    errors: int
    missing: int

    @property
    def truncated(self) -> bool:
        """Whether speech ended before its text: two units or more at its end are missing (or all there are), and of
        what comes before them more than half was understood.

        Speech that is not understood at all is not called short, silence is.
        """
        before = self.units - self.missing
        most = (1 - UNDERSTOOD) * before
        return self.missing >= min(LEAST_MISSING, self.units) > 0 and self.errors - self.missing <= most


def units(text: str, language: str | None) -> list[str]:
    """Words, and characters of scripts without spaces; `language` reads numbers where there is nothing else."""
    said = normalize(_TAG.sub(" ", unicodedata.normalize("NFKC", text)), usual="zh" if language == "zh" else "en")
    said = _DOTTED.sub(lambda match: match[0].replace(".", ""), _APOSTROPHES.sub("", said.casefold()))
    plain = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in said)
    return _WIDE.sub(r" \1 ", in_simplified(plain)).split()


def in_simplified(text: str) -> str:
    """Chinese in simplified script, all else as it is."""
    return _HAN_ONE.sub(lambda match: simplified(match[0]), text)


BY_WORDS = Scoring(units)


def score(text: str, understood: str, language: str | None, scoring: Scoring = BY_WORDS) -> Score:
    """Compare what was to be said with what a recognizer wrote; `language` is the text's."""
    wanted = scoring.units(text, language)
    errors, missing = align(scoring.units(understood, language), wanted)
    return Score(len(wanted), errors, missing)


def align(heard: Sequence[str], wanted: Sequence[str]) -> tuple[int, int]:
    """The edit distance (Levenshtein, 1966), and how many of `wanted`'s last units are missing in it.

    Of several best alignments the one counts whose deletions reach furthest back from the end.
    """
    row = list(range(len(wanted) + 1))  # of the heard so far, the distance to each beginning of `wanted`
    for word in heard:
        diagonal, row[0] = row[0], row[0] + 1
        for k, other in enumerate(wanted, 1):
            diagonal, row[k] = row[k], min(row[k] + 1, row[k - 1] + 1, diagonal + (word != other))
    ends = (k for k, distance in enumerate(row) if distance + len(wanted) - k == row[-1])
    return row[-1], len(wanted) - next(ends)
