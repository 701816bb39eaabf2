import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosyq.artifact.reader import open_artifact
from cosyq.text.split import SHORT_TAIL, split_text


def words(text):
    """A stand-in for a tokenizer: a Chinese character or a run of others is a token."""
    return sum(1 for c in text if "\u3400" <= c <= "\u9fff") + len([w for w in text.split() if w.isascii()])


def texts(text, longest=10):
    return [piece.text for piece in split_text(text, words, longest)]


ALPHABET = st.text(alphabet="ab .,!?;\n'\"()[]<>-，。！？；、…好你 \u0301é🙂\u200d[laughter]", max_size=300)


@settings(max_examples=300, deadline=None)
@given(ALPHABET, st.integers(3, 20))
def test_nothing_is_lost_and_order_is_kept(text, longest):
    assert "".join(texts(text, longest)) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["one", "two,", "three.", "four!", "好的。", "你好，", "Dr.", "x"]), max_size=80))
def test_pieces_are_short(parts):
    for piece in texts(" ".join(parts), 10):
        assert words(piece) <= 10 + 10 // SHORT_TAIL


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab c", max_size=40), st.sampled_from(["[laughter]", "<strong>", "</strong>", "[j]", "[ǐ]"]))
def test_no_tag_and_no_word_is_cut(text, tag):
    whole = f"{text}{tag}{text} {tag}" * 6
    pieces = texts(whole, 4)
    assert sum(piece.count(tag) for piece in pieces) == whole.count(tag)
    assert all(
        piece[0].isspace() or previous[-1].isspace() or tag in previous + piece for previous, piece in pairwise(pieces)
    )


CASES = [
    (6, ["One two. Three four. ", "Five six seven eight nine ten."]),
    (6, ["Dr. Smith met Mr. A. Jones ", "at 3.14 p.m. on Dec. 5. ", "It rained."]),
    (9, ["你好。今天天气很好！", "我们去公园吧？好的。"]),
    (3, ['"Stop!" he said. ', '"Why?" she asked.']),
    (5, ["a b c d e, ", "f g h i j, ", "k l m"]),
    (8, ["See http://example.com/a.b?c=d and v2.0.1 now."]),
    (10, ["好" * 10, "好" * 10, "好" * 5]),
    (5, ["Wait... what? No."]),
    (3, ["He said: no. ", "Yes; maybe."]),
    (4, ["one two three four ", "five six seven"]),
]


@pytest.mark.parametrize(("longest", "expected"), CASES)
def test_where_it_cuts(longest, expected):
    assert texts("".join(expected), longest) == expected


def test_one_sentence_a_piece_where_that_is_asked_for():
    text = "Good morning. How are you, Mr. Smith? Well!\n\nBye."
    pieces = split_text(text, len, one_sentence=True)
    assert [piece.text for piece in pieces] == ["Good morning. ", "How are you, Mr. Smith? ", "Well!\n\n", "Bye."]
    assert [piece.ends_paragraph for piece in pieces] == [False, False, True, True]


def test_paragraphs_are_marked():
    pieces = split_text("One two.\nThree.\n\nFour five.\n\n\nSix.", words, 10)
    assert [p.ends_paragraph for p in pieces] == [True, True, True]
    assert [p.text.strip() for p in pieces] == ["One two.\nThree.", "Four five.", "Six."]
    assert split_text("", words) == []


def test_a_chapter_takes_linear_time(artifact_of):
    tokenizer = open_artifact(artifact_of("int8")).tokenizer()
    chapter = "It was a dark and stormy night; the rain fell in torrents, except at intervals. " * 600

    def seconds(text):
        started = time.perf_counter()
        pieces = split_text(text, lambda part: len(tokenizer.encode(part)))
        assert "".join(p.text for p in pieces) == text
        return time.perf_counter() - started

    assert seconds(chapter) < 2
    assert seconds("好" * 40_000) < 4
    assert seconds("9" * 40_000) < 4
