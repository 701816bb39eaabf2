"""Errors counted by hand, by a definition that is too slow to use, and by jiwer where it is installed."""

import random
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosyq.eval.scoring import Score, align, score, units
from cosyq.eval.seedtts import AS_PUBLISHED
from cosyq.eval.seedtts import units as published_units


@pytest.mark.parametrize(
    ("text", "heard", "language", "expected"),
    [
        ("Help the woman.", "help the woman", "en", (3, 0)),
        ("Help the woman.", "help a woman up", "en", (3, 2)),
        ("Help the woman.", "", "en", (3, 3)),
        ("She paid $4.50 for 25 cups.", "she paid four dollars and fifty cents for twenty-five cups", "en", (11, 0)),
        ("Call me before 6 pm.", "Call me before 6 p.m.", "en", (5, 0)),
        ("It's ten o'clock in the U.S.", "its ten oclock in the US", "en", (6, 0)),
        ("It's late.", "it is late", "en", (2, 2)),  # contractions are not made alike
        ("[laughter] Well, well.", "well well", "en", (2, 0)),
        ("我今天很高兴。", "我今天很高心", "zh", (6, 1)),
        ("我有12个苹果。", "我有十二個蘋果", "zh", (7, 0)),
        ("十二", "12", "zh", (2, 0)),  # a number alone is read in the text's language
        ("twelve", "12", "en", (1, 0)),
        ("ＡＢＣ 公司", "abc公司", "zh", (3, 0)),
        ("我用 Python 写代码。", "我用 python 写带码", "zh", (6, 1)),  # a mixed error rate
        ("ラーメンを食べる。", "ラーメンを食べた", None, (8, 1)),
        ("안녕하세요", "안녕하세", None, (5, 1)),
        ("Schöne Grüße!", "schöne grüße", "en", (2, 0)),
    ],
)
def test_errors_counted_by_hand(text, heard, language, expected):
    found = score(text, heard, language)
    assert (found.units, found.errors) == expected


@pytest.mark.parametrize(
    ("text", "heard", "language", "errors", "count"),
    [
        ("It's ten o'clock, sir!", "it's ten oclock sir", "en", 1, 4),  # the apostrophe counts
        ("“Well,” he said—twice.", "well he saidtwice", "en", 0, 3),  # a dash joins
        ("He has 2 cats.", "he has two cats", "en", 1, 4),  # numbers are left as they are
        ("我有两个苹果，你呢？", "我有兩個蘋果你呢", "zh", 0, 8),
        ("用 AI 做", "用ai做", "zh", 2, 4),  # Latin letters one by one, in their case
    ],
)
def test_the_published_scoring(text, heard, language, errors, count):
    found = score(text, heard, language, AS_PUBLISHED)
    assert (found.errors, found.units) == (errors, count)


@pytest.mark.parametrize(
    ("heard", "truncated"),
    [
        ("the small dog barked at the mailman every day", False),
        ("the small dog barked at the mailman every", False),  # a recognizer loses one, too
        ("the small dog barked at the mailman", True),
        ("the small dog barked at the melon", True),
        ("small hog barked at the", True),
        ("a smile dock parked at", False),  # not understood: who knows what was said at the end
        ("the small dog barked at the mailman every way", False),
        ("the small dog at the mailman every day", False),  # missing in the middle
        ("", True),
    ],
)
def test_an_end_that_is_missing(heard, truncated):
    assert score("The small dog barked at the mailman every day.", heard, "en").truncated is truncated


def test_a_word_alone_is_missing_whole():
    assert score("Yes.", "", "en").truncated
    assert not score("Yes.", "yes", "en").truncated
    assert not Score(0, 0, 0).truncated


words = st.lists(st.sampled_from("abc"), max_size=7)


@given(words, words)
def test_the_alignment_is_the_best_that_ends_soonest(heard, wanted):
    @cache
    def distance(i, j):
        if not i or not j:
            return i + j
        return min(
            distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (heard[i - 1] != wanted[j - 1])
        )

    errors, missing = align(heard, wanted)
    assert errors == distance(len(heard), len(wanted))
    ends = [k for k in range(len(wanted) + 1) if distance(len(heard), k) + len(wanted) - k == errors]
    assert missing == len(wanted) - min(ends)


def test_jiwer_counts_the_same():
    jiwer = pytest.importorskip("jiwer")
    rng = random.Random(0)
    for _ in range(200):
        wanted, heard = ([rng.choice(["boat", "slid", "over", "the"]) for _ in range(rng.randint(1, 12))] for _ in "ab")
        measured = jiwer.process_words(" ".join(wanted), " ".join(heard))
        assert align(heard, wanted)[0] == measured.substitutions + measured.deletions + measured.insertions


def test_units_are_words_and_wide_characters():
    assert units("Tom's 3 cats—all grey.", "en") == ["toms", "three", "cats", "all", "grey"]
    assert units("第3名是Tom。", "zh") == ["第", "三", "名", "是", "tom"]
    assert published_units("Tom's 3 cats—all grey.", "en") == ["tom's", "3", "catsall", "grey"]
