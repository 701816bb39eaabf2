"""Long text into pieces that the model can say in one breath, nothing lost and nothing said twice.

The model is trained on sentences: its original splits at 60 to 80 tokens. Pieces here are slices of the text, so
joined they are the text again. Where a sentence is too long, commas give way, then spaces, and in scripts without
spaces any character that does not belong to the one before; tags such as `[laughter]` are never cut.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

LONGEST = 80  # tokens of a piece
LOOK_BACK = 12  # characters that tell an abbreviation
SHORT_TAIL = 6  # what is left over of a sixth of the longest joins the piece before

_PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")
_CLOSING = "\"'”’»)）】』」》\\]"
_SENTENCE = re.compile(rf"[。！？；…]+[{_CLOSING}]*\s*|[.!?;:]+[{_CLOSING}]*(?:\s+|$)|\n\s*")
_CLAUSE = re.compile(rf"[，、：—]+[{_CLOSING}]*\s*|[,–-]+[{_CLOSING}]*\s+")
_WORD = re.compile(r"\[[^\]\s]{1,24}\]\s*|</?[a-z_|]{1,24}>\s*|\s+|[^\s\[<]+\s*|[\[<]")
# A full stop after these, or after a single letter, is no end.
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'])(?:[A-Za-z]|[A-Za-z](?:\.[A-Za-z])+|dr|mrs?|ms|prof|st|vs|etc|fig|vol|jr|sr|gen|col|capt|approx|dept"
    r"|inc|ltd|co|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tue|wed|thu|fri|sat|sun)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Piece:
    """A slice of the text, and whether a paragraph ends with it."""

    text: str
    ends_paragraph: bool


def split_text(
    text: str, count: Callable[[str], int], longest: int = LONGEST, *, one_sentence: bool = False
) -> list[Piece]:
    """Cut `text` into pieces of at most `longest` tokens by `count`, a short tail joined to the piece before.

    With `one_sentence` no piece has more than one, however short it is.

    The texts of the pieces, joined, are `text`. Time is linear in its length.
    """
    pieces: list[Piece] = []
    for paragraph in _cut_after(text, _PARAGRAPH):
        parts = _fitting(paragraph, count, longest)
        packed = list(parts) if one_sentence else _pack(parts, count, longest)
        pieces += [Piece(part, False) for part in packed[:-1]] + [Piece(packed[-1], True)]
    return pieces


def ends_sentence(text: str, following: str) -> bool:
    """Whether a sentence ends with `text`, the character after it being `following`."""
    tail = text[-4 * LOOK_BACK :]
    end = _end(_SENTENCE, tail, following)
    return end is not None and not _abbreviates(tail, end)


def ends_clause(text: str, following: str) -> bool:
    """Whether a clause does."""
    return _end(_CLAUSE, text[-4 * LOOK_BACK :], following) is not None


def _end(separator: re.Pattern[str], text: str, following: str) -> re.Match[str] | None:
    end = len(text) + following.isspace()
    matches = separator.finditer(text + following)
    return next((m for m in matches if m.start() <= len(text) and m.end() == end), None)


def _fitting(paragraph: str, count: Callable[[str], int], longest: int) -> Iterator[str]:
    """Sentences, and parts of those that are too long."""
    for sentence in sentences(paragraph):
        if count(sentence) <= longest:
            yield sentence
            continue
        for clause in _cut_after(sentence, _CLAUSE):
            if count(clause) <= longest:
                yield clause
            else:
                yield from _pack(_words(clause, count, longest), count, longest, join_tail=False)


def sentences(paragraph: str) -> Iterator[str]:
    """The sentences with their ends and the space after them; joined they are `paragraph`."""
    begin = 0
    for match in _SENTENCE.finditer(paragraph):
        if _abbreviates(paragraph, match, begin):
            continue
        yield paragraph[begin : match.end()]
        begin = match.end()
    if begin < len(paragraph):
        yield paragraph[begin:]


def _abbreviates(text: str, stop: re.Match[str], begin: int = 0) -> bool:
    head = text[max(begin, stop.start() - LOOK_BACK) : stop.start()]
    return stop[0].startswith(".") and _ABBREVIATION.search(head) is not None


def _words(clause: str, count: Callable[[str], int], longest: int) -> Iterator[str]:
    """Words with the space after them; one that is too long, as Chinese without a comma is, character by character."""
    for match in _WORD.finditer(clause):
        word = match[0]
        if count(word) <= longest or word[0] in "[<":
            yield word
        else:
            yield from _characters(word)


def _characters(word: str) -> Iterator[str]:
    begin = 0
    for index in range(1, len(word)):
        joined = unicodedata.combining(word[index]) or word[index] in "\u200d\ufe0f" or word[index - 1] == "\u200d"
        if not joined:
            yield word[begin:index]
            begin = index
    yield word[begin:]


def _pack(parts: Iterator[str], count: Callable[[str], int], longest: int, *, join_tail: bool = True) -> list[str]:
    """Join neighbours while they fit together."""
    packed: list[list[str]] = [[]]
    used = size = 0
    for part in parts:
        size = count(part)
        if packed[-1] and used + size > longest:
            packed.append([])
            used = 0
        packed[-1].append(part)
        used += size
    if join_tail and len(packed) > 1 and used <= longest // SHORT_TAIL:
        last = packed.pop()
        packed[-1] += last
    return ["".join(group) for group in packed]


def _cut_after(text: str, separator: re.Pattern[str]) -> Iterator[str]:
    begin = 0
    for match in separator.finditer(text):
        if match.end() > begin:
            yield text[begin : match.end()]
            begin = match.end()
    if begin < len(text):
        yield text[begin:]
