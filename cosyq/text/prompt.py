"""What the language model is shown as text: the system line, `<|endofprompt|>`, a transcript, the words.

The checkpoint was trained with the marker always there; without it the prompt leaks into the speech. So it is
placed here, for every mode, and a text that brings its own is taken at its word.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from cosyq.errors import UsageError
from cosyq.text.normalize import normalize
from cosyq.text.split import split_text
from cosyq.text.tokenizer import END_OF_PROMPT, TextTokenizer

SYSTEM = "You are a helpful assistant."
MAX_CHARACTERS = 50_000  # a long chapter, an hour of speech


@dataclass(frozen=True)
class PromptedText:
    """Text ids of one utterance for the language model.

    with_speech: whether the prompt recording's tokens go along.
    ends_paragraph: whether a pause belongs after it.
    """

    prompt: list[int]
    words: list[int]
    with_speech: bool
    ends_paragraph: bool


def speakable(text: str) -> str:
    """The text without control characters; of white space, line ends and spaces remain.

    Raises:
        UsageError: nothing is left to say, or it is too long.
    """
    if len(text) > MAX_CHARACTERS:
        raise UsageError(f"{len(text)} characters are too many at once", where="text", remedy="give it in parts")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UsageError("not valid UTF-8", where="text")
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    kept = "".join(_plain(c) for c in lines).strip()
    if not _says_something(kept.rpartition(END_OF_PROMPT)[2]):
        raise UsageError("there is nothing to say: no letter and no digit", where="text")
    return kept


def compose(
    text: str, transcript: str, tokenizer: TextTokenizer, *, instruction: str = "", normalized: bool = True
) -> list[PromptedText]:
    """Put the pieces in the order of training: system line, marker, transcript, words; one item an utterance.

    The words are normalised first, all at once, so that the pieces are cut from what is said. The transcript and the
    instruction are not: the one states what was said in the recording, the other is not said.

    Under an instruction ("speak slowly"), the prompt's words and speech stay out: they would be imitated instead.
    A text that brings its own marker is an instruction and what to say.

    Raises:
        UsageError: nothing is left to say, it is too long, or there are two instructions, or wetext is
            needed and cannot be imported.
    """
    text = speakable(text)
    head, marker, words = text.rpartition(END_OF_PROMPT)
    if instruction and (marker or END_OF_PROMPT in instruction):
        raise UsageError(f"{END_OF_PROMPT} is placed for you", where="instruction", remedy="leave it out")
    if marker:
        prompt, with_speech = head + marker, False
    elif instruction:
        prompt, with_speech = f"{SYSTEM} {speakable(instruction)}{END_OF_PROMPT}", False
    elif END_OF_PROMPT in transcript:
        prompt, with_speech = transcript, True
    else:
        prompt, with_speech = f"{SYSTEM}{END_OF_PROMPT}{transcript}", bool(transcript)
    if normalized:
        words = normalize(words)
    before = tokenizer.encode(prompt)
    pieces = [
        piece for piece in split_text(words, lambda part: len(tokenizer.encode(part))) if _says_something(piece.text)
    ]
    return [
        PromptedText(before, tokenizer.encode(" ".join(piece.text.split())), with_speech, piece.ends_paragraph)
        for piece in pieces
        if _says_something(piece.text)
    ]


def _plain(character: str) -> str:
    if character == "\n":
        return character
    if character.isspace():
        return " "
    return "" if unicodedata.category(character)[0] == "C" else character


def _says_something(text: str) -> bool:
    return any(unicodedata.category(c)[0] in "LN" for c in text)
