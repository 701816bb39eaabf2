"""A text as plain words and the spans that are not: what finds them, and what both languages read alike.

Rules are tried in order at each place and the first that fits reads its span. Every pattern is linear: it starts where
no letter or digit is before it, and takes runs whole, without giving back (`++`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from cosyq.text.tokenizer import special_tokens

Rule = tuple[str, Callable[[re.Match[str]], str]]

# 1,234,567.89 or 1234567.89, each run of digits whole.
INTEGER = r"(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)"
NUMBER = INTEGER + r"(?:\.\d++)?+"

TAG = r"(?=[\[<])(?:" + "|".join(map(re.escape, special_tokens())) + ")"
# Pictures have no sound: they go, with the space before them.
_PICTURE = "[\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff\ufe0e\ufe0f\u200d\u20e3]++"
PICTURE = rf"(?<!\s)[^\S\n]*+{_PICTURE}|{_PICTURE}"

_WEB = "com|org|net|edu|gov|io|ai|cn|dev|app|uk|de|fr|jp|eu|info|xyz"
_FILE = (
    "txt|md|pdf|docx?|xlsx?|pptx?|csv|tsv|json|ya?ml|toml|xml|html?|css|js|ts|py|ipynb|sh|rs|go|java|cpp|zip|gz|tar|exe"
    "|dll|so|wav|mp3|mp4|flac|ogg|png|jpe?g|gif|svg|safetensors|pt|onnx|log|cfg|ini|conf"
)
_PATH = r"[^\s<>\[\]\"'，。、；！？：（）【】《》“”‘’]"
EMAIL = r"(?<![\w.+-])[\w.+-]++@[\w-]++(?:\.[\w-]++)++"
URL = rf"(?<!\w)(?:https?|ftp)://{_PATH}++"
BARE_URL = rf"(?<![\w.@/-])(?=[\w.-]*\.(?:{_WEB})(?![\w-]))[A-Za-z0-9][\w-]*+(?:\.[\w-]++)++(?:[:/]{_PATH}++)?"
FILE = rf"(?<![\w.@/-])(?=[\w.-]*\.(?:{_FILE})(?![\w-]))[\w-]++(?:\.[\w-]++)++"
IP = r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.]*\d)"

SUPERSCRIPTS = {"²": "2", "³": "3"}
FRACTIONS = dict(zip("½⅓⅔¼¾⅛⅜⅝⅞", ("1/2", "1/3", "2/3", "1/4", "3/4", "1/8", "3/8", "5/8", "7/8"), strict=True))


# No span starts inside a Latin word or a run of white space: the rest of it need not be tried.
_NO_START = r"(?<=[A-Za-z])[A-Za-z]++|(?<=\s)\s+(?=\s)"


class Reader:
    """An ordered table of rules over a text. Groups of a pattern have names."""

    def __init__(self, rules: Sequence[Rule]):
        # One scan finds the place and the rule; the rule's own pattern then names the parts.
        self._rules = rules
        unnamed = [re.sub(r"\(\?P<\w+>", "(?:", pattern) for pattern, _ in rules]
        self._any = re.compile("|".join([_NO_START, *(f"({pattern})" for pattern in unnamed)]), re.ASCII)

    def read(self, text: str) -> str:
        """`text` with the spans read; what lies between them is copied."""
        spoken: list[str] = []
        begin = 0
        for found in self._any.finditer(text):
            if found.lastindex is None:
                continue
            pattern, read = self._rules[found.lastindex - 1]
            match = _compiled(pattern).match(text, found.start())
            assert match is not None
            spoken += [text[begin : found.start()], read(match)]
            begin = found.end()
        spoken.append(text[begin:])
        return _joined(spoken)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """When it is first needed: a plain text needs none of a hundred."""
    return re.compile(pattern, re.ASCII)


def _joined(parts: list[str]) -> str:
    """The parts in order, a space between two that would grow into one Latin word."""
    joined: list[str] = []
    before = ""
    for part in filter(None, parts):
        if _latin(before) and _latin(part[0]):
            joined.append(" ")
        joined.append(part)
        before = part[-1]
    return "".join(joined)


def _latin(character: str) -> bool:
    return character.isascii() and character.isalnum()


def spell_address(address: str, names: Mapping[str, str], number: Callable[[str], str], gap: str) -> str:
    """An address or file name: its words, its symbols by `names`, its numbers by `number`, with `gap` between.

    The scheme is left out, as nobody says it; a full stop or comma at the end is the sentence's.
    """
    body = re.sub(r"^[a-z]+://", "", address)
    end = re.search(r"[.,;:!?)\]/]*$", body)
    assert end is not None
    parts = re.findall(r"[0-9]+|[^\W\d_]+|[^\s]", body[: end.start()])
    words = [number(part) if part.isdigit() and part.isascii() else names.get(part, part) for part in parts]
    return gap.join(words) + end[0].replace("/", "")
