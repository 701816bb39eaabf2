"""What the language model is shown as text: the system line, `<|endofprompt|>`, a transcript, the words.

The checkpoint was trained with the marker always there; without it the prompt leaks into the speech. So it is
placed here, for every mode, and a text that brings its own is taken at its word.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from cosyq.errors import UsageError
from cosyq.text.apart import Tokenizer
from cosyq.text.normalize import normalize
from cosyq.text.split import split_text
from cosyq.text.tokenizer import END_OF_PROMPT

SYSTEM = "You are a helpful assistant."
MAX_CHARACTERS = 50_000  # a long chapter, an hour of speech


@dataclass(frozen=True)
class PromptedText:
    """Text ids of one utterance for the language model.

    text: what is said, which `words` are the ids of.
    with_speech: whether the prompt recording's tokens go along.
    ends_paragraph: whether a pause belongs after it.
    """

    text: str
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
        raise too_long(len(text))
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    kept = "".join(plain(c) for c in lines).strip()
    if not says_something(kept.rpartition(END_OF_PROMPT)[2]):
        raise nothing_to_say()
    return kept


def compose(
    text: str,
    transcript: str,
    tokenizer: Tokenizer,
    *,
    instruction: str = "",
    normalized: bool = True,
    one_sentence: bool = False,
) -> list[PromptedText]:
    """Put the pieces in the order of training: system line, marker, transcript, words; one item an utterance.

    The words are normalised first, all at once, so that the pieces are cut from what is said. The transcript and the
    instruction are not: the one states what was said in the recording, the other is not said.

    With `one_sentence` every sentence is an utterance of its own.

    Under an instruction ("speak slowly"), the prompt's words and speech stay out: they would be imitated instead.
    A text that brings its own marker is an instruction and what to say.

    Raises:
        UsageError: nothing is left to say, it is too long, or there are two instructions, or wetext is
            needed and cannot be imported.
    """
    text = speakable(text)
    head, marker, words = text.rpartition(END_OF_PROMPT)
    if marker and instruction:
        raise placed_for_you("instruction")
    if marker:
        prompt, with_speech = tokenizer.encode(head + marker), False
    else:
        head_ids, transcript_ids = compose_prompt(transcript, tokenizer, instruction=instruction)
        prompt, with_speech = head_ids + transcript_ids, bool(transcript_ids)
    if normalized:
        words = normalize(words)
    pieces = [
        (" ".join(piece.text.split()), piece.ends_paragraph)
        for piece in split_text(words, lambda part: len(tokenizer.encode(part)), one_sentence=one_sentence)
        if says_something(piece.text)
    ]
    return [PromptedText(said, prompt, tokenizer.encode(said), with_speech, ends) for said, ends in pieces]


def compose_prompt(transcript: str, tokenizer: Tokenizer, *, instruction: str = "") -> tuple[list[int], list[int]]:
    """What stands before the words: ids up to and with the marker, and the ids of the transcript after it.

    Raises:
        UsageError: the instruction says nothing, or brings a marker.
    """
    if END_OF_PROMPT in instruction:
        raise placed_for_you("instruction")
    if instruction:
        prompt = f"{SYSTEM} {speakable(instruction)}{END_OF_PROMPT}"
    elif END_OF_PROMPT in transcript:
        prompt = transcript
    else:
        prompt = f"{SYSTEM}{END_OF_PROMPT}{transcript}"
    ids = tokenizer.encode(prompt)
    end = ids.index(tokenizer.end_of_prompt) + 1
    return ids[:end], ids[end:]


def plain(character: str) -> str:
    """A line end as it is, other white space as a space, a control character as nothing.

    Raises:
        UsageError: it is half of a surrogate pair, as a broken decoder leaves them.
    """
    if character == "\n":
        return character
    if character.isspace():
        return " "
    if "\ud800" <= character <= "\udfff":
        raise UsageError("not valid UTF-8", where="text")
    return "" if unicodedata.category(character)[0] == "C" else character


def says_something(text: str) -> bool:
    return any(unicodedata.category(c)[0] in "LN" for c in text)


def nothing_to_say() -> UsageError:
    return UsageError("there is nothing to say: no letter and no digit", where="text")


def too_long(characters: int) -> UsageError:
    return UsageError(f"{characters} characters are too many at once", where="text", remedy="give it in parts")


def placed_for_you(where: str) -> UsageError:
    return UsageError(f"{END_OF_PROMPT} is placed for you", where=where, remedy="leave it out")
