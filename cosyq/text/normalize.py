"""Numbers, symbols and abbreviations in words, in English and Mandarin, before the text is split and tokenized.

A text is taken sentence by sentence for its language, and each span that is not plain words is read by a rule, most of
them by asking wetext. All else is copied as it stands: plain words never reach the engine, and a text without a number
does not even load it. Tags such as `[laughter]` pass untouched, the words between two are read.
Time is linear in the length of the text.

A sentence is Mandarin when it has more Han characters than English words in lower case (names and acronyms occur in
both), and English when it has any other Latin letters; a sentence without letters goes with the one before it.
Japanese, Korean and sentences in any other script are left alone, digits too: better unread than read in the wrong
language. French, German, Italian and Spanish are not told from English: write their numbers in words, or speak them
without normalization.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from cosyq.text import chinese_rules, english_rules
from cosyq.text.spans import TAG
from cosyq.text.split import ends_sentence, sentences

_TAG = re.compile(TAG)
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f\uff21-\uff3a\uff41-\uff5a]+")
_WORD = re.compile(r"(?<![\w@./:-])[a-z]{2,}(?![\w@/:]|[.-]\w)", re.ASCII)  # not of an address, not a unit
_GREEK = "\u0370-\u03ff\u00b5"
_SYMBOL = re.compile(f"(?<![{_GREEK}])[{_GREEK}](?![{_GREEK}])")  # μ, π: not yet Greek
_PUNCTUATION = re.compile("[，。、；：！？《》「」]")  # of "3D、4K"
_PLAIN = re.compile(rf"\s*(?:[A-Za-z]?[a-z]*(?:['’][a-z]+)?[,;:]?|{_HAN.pattern}+[，、；：]?)\s*")
_MAY_COUNT = re.compile(r"\b[A-Za-z]{1,4}\.\s*$")  # "No." before a number
LONGEST_HELD = 2000  # characters of a sentence that is still being written

_HALF_WIDTH = str.maketrans("０１２３４５６７８９％＄＋＝＃＆＠．", "0123456789%$+=#&@.")


def normalize(text: str, *, usual: str = "en") -> str:
    """`text` as it is said.

    Args:
        usual: the language of a text without letters, en or zh.

    Raises:
        UsageError: a span needs wetext, and wetext cannot be imported.
    """
    return "".join(_read(language, run) for language, run in _runs(text, usual))


def normalize_arriving(characters: Iterable[str]) -> Iterator[str]:
    """A text that is still being written, as it is said.

    Plain words are passed on as they come, with one word of foresight ("No." may become "number"); from the first that
    is not plain, the sentence is held to its end, as what a number is called depends on what follows it. A sentence
    without letters is English here, or Mandarin by its signs: the text around it is not known.

    Raises:
        UsageError: a span needs wetext, and wetext cannot be imported.
    """
    sentence, given, word = "", 0, 0  # what of the sentence was passed on, where its last word begins
    held = ended = False
    for character in characters:
        ended = ended or ends_sentence(sentence, character)
        counts = _MAY_COUNT.search(sentence) and (character.isspace() or character.isdigit())
        if sentence and ended and not counts:
            yield _rest(sentence, given)
            sentence, given, word, held = "", 0, 0, False
        ended = ended and bool(counts) and character.isspace()
        sentence += character
        if character == "\n" or len(sentence) == LONGEST_HELD:
            yield _rest(sentence, given)
            sentence, given, word, held = "", 0, 0, False
        elif not held and (character.isspace() or character in "，、；："):
            held = _PLAIN.fullmatch(sentence, word) is None
            if not held:
                if word > given:
                    yield sentence[given:word]
                given, word = word, len(sentence)
    yield _rest(sentence, given)


def _rest(sentence: str, given: int) -> str:
    """What is left to say of a sentence when `given` characters were passed on as they stand."""
    spoken, said = normalize(sentence), sentence[:given]
    return spoken[given:] if spoken.startswith(said) else normalize(sentence[given:])


def _read(language: str, run: str) -> str:
    if language == "other":
        return run
    reader = chinese_rules.reader() if language == "zh" else english_rules.reader()
    return reader.read(run.translate(_HALF_WIDTH))


def _runs(text: str, usual: str) -> Iterator[tuple[str, str]]:
    """Sentences with their language, neighbours of one language together."""
    usual = language = language_of(text) or usual
    run: list[str] = []
    for sentence in sentences(text):
        found = language_of(sentence) or language
        if found == "zh" and usual == "other":
            found = usual  # a Japanese sentence may have no kana
        if found != language and run:
            yield language, "".join(run)
            run = []
        language = found
        run.append(sentence)
    yield language, "".join(run)


def language_of(text: str) -> str:
    """en, zh, other, or nothing where there is no letter."""
    bare = _SYMBOL.sub("", _TAG.sub(" ", text))
    han, words = len(_HAN.findall(bare)), len(_WORD.findall(bare))
    other = sum(map(str.isalpha, _LATIN.sub("", _HAN.sub("", bare))))
    if other > max(words, han / 4):
        return "other"
    if han and han >= words:
        return "zh"
    if not _LATIN.search(bare):
        return ""
    return "zh" if _PUNCTUATION.search(bare) and not words else "en"
