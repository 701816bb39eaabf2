"""What the language model is shown as text: the system line, `<|endofprompt|>`, a transcript, the words.

The checkpoint was trained with the marker always there; without it the prompt leaks into the speech. So it is
placed here, for every mode, and a text that brings its own is taken at its word.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from cosyq.errors import UsageError
from cosyq.text.tokenizer import END_OF_PROMPT, TextTokenizer

SYSTEM = "You are a helpful assistant."
MAX_CHARACTERS = 10_000  # before tokenizing
SPLIT = "give it sentence by sentence"
MAX_TOKENS = 1_000  # of one utterance; the model is trained on sentences


@dataclass(frozen=True)
class PromptedText:
    """Text ids for the language model. `with_speech`: whether the prompt recording's tokens go along."""

    prompt: list[int]
    words: list[int]
    with_speech: bool


def speakable(text: str) -> str:
    """The text without control characters.

    Raises:
        UsageError: nothing is left to say, or it is too long for one utterance.
    """
    if len(text) > MAX_CHARACTERS:
        raise UsageError(f"{len(text)} characters are too many for one utterance", where="text", remedy=SPLIT)
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UsageError("not valid UTF-8", where="text")
    kept = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    if not any(unicodedata.category(c)[0] in "LN" for c in kept.rpartition(END_OF_PROMPT)[2]):
        raise UsageError("there is nothing to say: no letter and no digit", where="text")
    return kept.strip()


def compose(text: str, transcript: str, tokenizer: TextTokenizer, *, instruction: str = "") -> PromptedText:
    """Put the pieces in the order of training: system line, marker, transcript, words.

    Under an instruction ("speak slowly"), the prompt's words and speech stay out: they would be imitated instead.
    A text that brings its own marker is an instruction and what to say.

    Raises:
        UsageError: nothing is left to say, it is too long, or there are two instructions.
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
    ids = tokenizer.encode(words)
    if len(ids) > MAX_TOKENS:
        raise UsageError(
            f"{len(ids)} tokens are too many for one utterance (at most {MAX_TOKENS})",
            where="text",
            remedy=SPLIT,
        )
    return PromptedText(tokenizer.encode(prompt), ids, with_speech)
