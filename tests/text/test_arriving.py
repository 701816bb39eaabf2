"""Text in pieces: the ids, and where utterances end, depend on the text alone and come as early as is safe."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, trainers

from cosyq.errors import UsageError
from cosyq.text.arriving import LONGEST_ARRIVING, utterances
from cosyq.text.prompt import MAX_CHARACTERS, plain
from cosyq.text.split import LONGEST
from cosyq.text.tokenizer import END_OF_PROMPT, TextTokenizer, assemble

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then it didn't; we're in 2024, they'll say.",
    'It was a dark and stormy night: the rain fell in torrents... "Stop!" he said. We\'ve $12.50 left.',
    "今天天气很好，我们去公园吧？好的。你好，世界！天天向上；这是第一个句子。价格是三元五角。",
    "नमस्ते दुनिया, क़लम। สวัสดีชาวโลก. café naïve e\u0301e\u0301 안녕하세요 세계",
]


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE with many merges across all of these, which the golden one, of 40 merges, is not."""
    alphabet = {c: i for i, c in enumerate(sorted(set(_bytes_to_characters().values())))}
    trained = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    shape = Tokenizer.from_str(assemble(alphabet, [], {}))
    trained.normalizer, trained.pre_tokenizer = shape.normalizer, shape.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=sorted(alphabet), show_progress=False, special_tokens=[]
    )
    trained.train_from_iterator(CORPUS * 3, trainer)
    trained.add_special_tokens(
        [
            AddedToken(t, normalized=False)
            for t in (END_OF_PROMPT, "[laughter]", "[quick_breath]", "<strong>", "</strong>")
        ]
    )
    return TextTokenizer(trained.to_str())


def _bytes_to_characters():
    from tokenizers.pre_tokenizers import ByteLevel

    return dict(enumerate(sorted(ByteLevel.alphabet())))


def read(pieces, tokenizer):
    return [(u, list(u)) for u in utterances(pieces, tokenizer.encode, normalized=False)]


def collapsed(text):
    return " ".join("".join(plain(c) for c in text).split())


SCRAPS = st.sampled_from(
    ["the", " quick", "fox", "didn", "'", "t", "'ll", " ", "  ", "\n", ".", "...", ",", "!", "2024", "3", "$", "(", ")", "\"",
     "今天", "天", "天气", "很好", "，", "。", "！", "は", "नमस्ते", "\u0958", "\u0301", "e\u0301", "a\u0323\u0307", "สวัส", "안녕", "\u1100", "\u1161",
     "[laughter]", "[laugh", "[quick_breath]", "quick_breath]", "<strong>", "</strong>", "<", "[", "]", ">", "é", "Ω", "\u2126", "ſ", "🙂", "\u200d", "\r\n", "—"]
)  # fmt: skip
TEXTS = st.lists(SCRAPS, max_size=60).map("".join) | st.text(max_size=80)


@settings(max_examples=600, deadline=None)
@given(text=TEXTS, data=st.data())
def test_ids_are_those_of_the_whole_text_however_it_is_cut(tokenizer, text, data):
    pieces, rest = [], text
    while rest:
        size = data.draw(st.integers(0, min(len(rest), 9)))
        pieces.append(rest[:size])
        rest = rest[size:]
    if not any(c.isalnum() for c in text) or END_OF_PROMPT in text:
        return
    found = read(pieces, tokenizer)
    assert found
    for utterance, ids in found:
        assert ids == tokenizer.encode(utterance.text)
        assert utterance.text == collapsed(utterance.text)
        assert len(ids) < LONGEST_ARRIVING
    assert [(u.text, u.ends_paragraph, ids) for u, ids in found] == [
        (u.text, u.ends_paragraph, ids) for u, ids in read([text], tokenizer)
    ]


@settings(max_examples=100, deadline=None)
@given(text=st.lists(SCRAPS, min_size=200, max_size=400).map("".join))
def test_nothing_is_lost_but_what_says_nothing(tokenizer, text):
    kept = "".join(u.text for u, _ in read([text, " end"], tokenizer)).replace(" ", "")
    letters = lambda s: [c for c in s if c.isalnum()]  # noqa: E731
    assert letters(kept) == letters(collapsed(text + " end"))


@pytest.mark.parametrize(
    ("text", "certain"),
    [
        ("Hello wor", "Hello"),
        ("Hello wor ", "Hello wor"),
        ("你好，世界", "你好"),
        ("In 2024", "In 202"),  # digits are split one by one, but a mark may follow
        ("a [laughter", "a"),
        ("a [laughter]b.", "a [laughter]b"),
        ("don't", "don"),
        ("... he", ""),
        ("... he ", "... he"),
    ],
)
def test_what_is_certain_before_the_text_ends(tokenizer, text, certain):
    assert _heard(text, tokenizer) == (tokenizer.encode(certain), False)


def _heard(text, tokenizer):
    """The ids that are given before more of the text is asked for, and whether the utterance has ended then."""

    class More(Exception):
        pass

    def pieces():
        yield text
        raise More

    ids = []
    try:
        for utterance in utterances(pieces(), tokenizer.encode, normalized=False):
            for token in utterance:
                ids.append(token)
            return ids, True
    except More:
        return ids, False


def test_a_blank_line_ends_the_utterance_at_once(tokenizer):
    assert _heard("Hello there.\n\n", tokenizer) == (tokenizer.encode("Hello there."), True)
    assert _heard("Hello there.\n", tokenizer)[1] is False
    found = read(["One.\n \nTwo.\n\n...\n\nThree"], tokenizer)
    assert [(u.text, u.ends_paragraph) for u, _ in found] == [("One.", True), ("Two.", True), ("Three", True)]


SENTENCE = "the lazy dog jumps over a quick fox and the rain fell in Dr. Who's torrents"


@pytest.mark.parametrize(
    ("stop", "unit"),
    [(". ", SENTENCE), ("。", "今天天气很好我们去公园吧"), (", ", SENTENCE), (" ", SENTENCE), ("", "天很")],
)
def test_long_text_becomes_utterances_at_the_best_place_there_is(tokenizer, stop, unit):
    text = (unit + stop) * (60 if stop else 400)
    found = read([text], tokenizer)
    assert len(found) > 2
    least = {". ": 1.0, "。": 1.0, ", ": 1.5, " ": 2.0, "": 2.5}[stop]
    for utterance, ids in found[:-1]:
        assert least * LONGEST <= len(ids) < (least + 0.5) * LONGEST
        if stop.strip():
            assert utterance.text.endswith(stop.strip())
        elif stop:
            assert utterance.text.split()[-1] in unit.split()
    assert not any(u.ends_paragraph for u, _ in found[:-1])


def test_a_word_has_an_end(tokenizer):
    found = read(["the" * 300], tokenizer)
    assert [len(u.text) for u, _ in found] == [256, 256, 256, 132]


def test_the_blank_line_after_a_full_utterance_is_not_lost(tokenizer):
    long = f"{SENTENCE}, {SENTENCE}, {SENTENCE}, {SENTENCE}."
    assert len(tokenizer.encode(long)) > LONGEST
    found = read([f"{long}\n\nAnd {long} Then."], tokenizer)
    assert [(u.text[-5:], u.ends_paragraph) for u, _ in found] == [
        ("ents.", True), ("ents.", False), ("Then.", True)
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "  \n", "...", "🙂", "—" * 5000, "\x00"])
def test_nothing_to_say_is_known_when_the_text_ends(tokenizer, text):
    with pytest.raises(UsageError, match="nothing to say"):
        read(list(text), tokenizer)


def test_what_cannot_be_text(tokenizer):
    with pytest.raises(UsageError, match="characters are too many"):
        read(["hello "] * (MAX_CHARACTERS // 6 + 1), tokenizer)
    with pytest.raises(UsageError, match="not valid UTF-8"):
        read(["he", "\udcff"], tokenizer)
    with pytest.raises(UsageError, match="placed for you"):
        read(["slowly<|endof", "prompt|>hello"], tokenizer)
    with pytest.raises(TypeError, match="found NoneType"):
        read(["hello", None], tokenizer)
