"""Text that is still being written, cut into utterances and tokenized as far as no later text can change it.

Everything is decided character by character, with one character of foresight, so that the ids depend on the text
and not on the pieces in which it came. Within an utterance they are the ids of its whole text: a byte-pair merge
reaches no further than a word of the tokenizer's, and words end where Qwen2's split of text ends them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from cosyq.text.normalize import normalize_arriving
from cosyq.text.prompt import MAX_CHARACTERS, nothing_to_say, placed_for_you, plain, says_something, too_long
from cosyq.text.split import LONGEST, ends_clause, ends_sentence
from cosyq.text.tokenizer import END_OF_PROMPT

Encode = Callable[[str], list[int]]

# An utterance ends at the first of these that comes when it has so many times LONGEST tokens.
AT_SENTENCE, AT_CLAUSE, AT_SPACE, ANYWHERE = 1.0, 1.5, 2.0, 2.5
LONGEST_WORD = 256  # characters without a space after which it may end anywhere too
LONGEST_ARRIVING = 4 * LONGEST  # tokens: no utterance has as many, whatever the last character adds to ANYWHERE

_OPEN_TAG = re.compile(r"[\[<][^\s\]>]{0,24}$")  # what may become a token such as [laughter]


@dataclass(frozen=True)
class Word:
    """A slice of an utterance's text, and ids that are certain."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class End:
    """The utterance ends here, and perhaps a paragraph does."""

    paragraph: bool


class Utterance:
    """One utterance, as an iterator over ids that waits for the text; `text` is what was read of it so far."""

    def __init__(self, first: Word, rest: Iterator[Word | End]):
        self.text = ""
        self.ends_paragraph = False
        self._events = chain([first], rest)

    def __iter__(self) -> Iterator[int]:
        for event in self._events:
            if isinstance(event, End):
                self.ends_paragraph = event.paragraph
                return
            self.text += event.text
            yield from event.ids


def utterances(pieces: Iterable[str], encode: Encode, *, normalized: bool) -> Iterator[Utterance]:
    """The utterances of a text that arrives in `pieces`; each is to be read to its end before the next.

    Where it is to be `normalized`, what is read are the words that are said.

    Raises:
        UsageError: as soon as the text turns out to be too long, to bring a marker, or to say nothing.
    """
    written = characters(pieces)
    events = words(normalize_arriving(written) if normalized else written, encode)
    last = None
    for event in events:
        if isinstance(event, Word):
            last = Utterance(event, events)
            yield last
        elif last is not None and event.paragraph:  # the empty line after an utterance that had ended already
            last.ends_paragraph = True


def characters(pieces: Iterable[str]) -> Iterator[str]:
    """The text without control characters, as `prompt.speakable` leaves it."""
    total, previous = 0, ""
    for piece in pieces:
        if not isinstance(piece, str):
            raise TypeError(f"text arrives as str, found {type(piece).__name__}")
        total += len(piece)
        if total > MAX_CHARACTERS:
            raise too_long(total)
        for character in piece:
            if (previous, character) != ("\r", "\n"):
                yield plain("\n" if character == "\r" else character)
            previous = character


def words(pieces: Iterable[str], encode: Encode) -> Iterator[Word | End]:
    """Words as soon as they are certain, and ends as soon as they are due; at least one word."""
    growing = _Growing(encode)
    spoken = False
    for character in chain(chain.from_iterable(pieces), ("\n", "\n")):  # the end of the text ends a paragraph
        for event in growing.add(character):
            spoken = spoken or isinstance(event, Word)
            yield event
    if not spoken:
        raise nothing_to_say()


class _Growing:
    """The utterance that the text is in. White space is one space in it, and none at its begin.

    What comes before its first letter or digit is held back, so that no utterance says nothing.
    """

    def __init__(self, encode: Encode):
        self._encode = encode
        self._text, self._tokens = "", 0  # certain
        self._held = ""  # not certain yet
        self._gap = self._lines = 0  # white space after it, and line ends in that

    def add(self, character: str) -> Iterator[Word | End]:
        if not self._gap and self._held:
            due = self._due(character)
            if due or character.isspace() or _word_ends(self._held, character):
                yield from self._word()
            if due:
                yield from self._end(paragraph=False)
        if character.isspace():
            self._gap += 1
            self._lines += character == "\n"
            if character == "\n" and self._lines == 2:
                yield from self._end(paragraph=True)
            return
        if self._gap and (self._text or self._held):
            self._held += " "
        self._gap = self._lines = 0
        self._held += character

    def _due(self, following: str) -> bool:
        """Whether the utterance ends before `following`."""
        if self._tokens + len(self._held.encode()) < AT_SENTENCE * LONGEST:
            return False
        text = self._text + self._held
        share = (self._tokens + len(self._encode(self._held))) / LONGEST
        return (
            (share >= AT_SENTENCE and ends_sentence(text, following))
            or (share >= AT_CLAUSE and ends_clause(text, following))
            or (share >= AT_SPACE and following.isspace())
            or share >= ANYWHERE
            or len(self._held) >= LONGEST_WORD
        )

    def _word(self) -> Iterator[Word]:
        if not self._text and not says_something(self._held):
            return
        if END_OF_PROMPT in self._held:
            raise placed_for_you("text")
        word = Word(self._held, self._encode(self._held))
        self._text, self._tokens, self._held = self._text + word.text, self._tokens + len(word.ids), ""
        yield word

    def _end(self, *, paragraph: bool) -> Iterator[End]:
        self._text, self._tokens, self._held = "", 0, ""
        yield End(paragraph)


def _word_ends(text: str, following: str) -> bool:
    """Whether the tokenizer splits between them, whatever comes after.

    `QWEN2_WORDS` takes letters in runs, digits one by one, and signs together with letters after them. A mark may
    compose with what it follows, and an open bracket may become a special token.
    """
    # As the tokenizer sees them: a few letters are a letter and a mark in NFC.
    last, first = unicodedata.normalize("NFC", text[-1])[-1], unicodedata.normalize("NFC", following)[0]
    before, after = unicodedata.category(last)[0], unicodedata.category(first)[0]
    if before not in "LN" or after not in "LNPS" or before == after == "L":
        return False
    return not _OPEN_TAG.search(text)
