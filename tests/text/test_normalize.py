import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosyq.artifact.reader import open_artifact
from cosyq.errors import UsageError
from cosyq.text import chinese_rules, engine, english_rules
from cosyq.text.engine import engine_name, say
from cosyq.text.normalize import LONGEST_HELD, normalize, normalize_arriving
from cosyq.text.prompt import compose
from cosyq.text.split import LONGEST, SHORT_TAIL
from cosyq.text.tokenizer import special_tokens

ROWS = [
    line.split("\t")
    for line in (Path(__file__).parent / "readings.tsv").read_text("utf-8").splitlines()
    if not line.startswith("# ")
]
TAGS = [tag for tag in special_tokens() if tag != "<|endofprompt|>"]
ENGLISH = [
    "the",
    "rain",
    "in",
    "Spain",
    "falls",
    "on",
    "May",
    "and",
    "march",
    "plains",
    "Mon",
    "sat",
    "No",
    "Dr",
    "a",
    "I",
    "x",
    "St",
    "it's",
    "don't",
    "café",
    "naïve",
]
HAN = "今天天气很好我们去公园吧一二三两点半百分之加减"


@pytest.mark.parametrize(("written", "said"), ROWS)
def test_readings(written, said):
    assert normalize(written) == said
    assert normalize(said) == said  # what is said is not read again


def test_there_are_enough_readings():
    assert len(ROWS) == len({written for written, _ in ROWS}) >= 200


PLAIN = st.lists(st.sampled_from([*ENGLISH, HAN, ",", ".", "!", "—", "，", "。", '"', "\n", "\n\n"]), max_size=40)


@settings(max_examples=200, deadline=None)
@given(PLAIN)
def test_plain_words_stay_as_they_are(words):
    text = " ".join(words)
    assert normalize(text) == text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(TAGS), max_size=30), st.sampled_from(["", " ", " words ", "好"]))
def test_tags_alone_stay_as_they_are(tags, between):
    text = between.join(tags)
    assert normalize(text) == text


FRAGMENTS = [
    "12",
    " 3.5 kg",
    "GPT-4o",
    "$5",
    "约1/3",
    "，",
    "words ",
    "你好",
    "2个",
    " ",
    "-",
    ":",
    "@b.com",
    "http://a.b/",
    "#",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(TAGS), st.sampled_from(FRAGMENTS)), max_size=30))
def test_tags_survive_in_order(parts):
    tag = re.compile("|".join(map(re.escape, TAGS)))
    text = "".join(parts)
    assert tag.findall(normalize(text)) == tag.findall(text)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*FRAGMENTS, *ENGLISH, HAN, "5", "7"]), max_size=30))
def test_words_between_numbers_keep_their_order(parts):
    """Each is marked; a mark is a word of its own that nothing reads."""
    marks = [f"mark{chr(97 + i)}" for i in range(len(parts))]
    text = " ".join(f"{part} {mark}" for part, mark in zip(parts, marks, strict=True))
    assert re.findall("mark[a-z{|}~]", normalize(text)) == re.findall("mark[a-z{|}~]", text)


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_read(text):
    read = normalize(text)
    assert any(map(str.isalnum, read)) or not any(c.isalpha() for c in text)


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="0123456789.,:/-+%$¥€°~=()#@&'\"²½ kmgGPTvaphxs年月日点个第元约好到", max_size=60))
def test_no_digit_is_left_and_none_is_invented(text):
    read = normalize(text)
    assert not re.search("[0-9]", read)
    if not re.search("[0-9½²]", text):  # without a number there is no number word
        assert len(re.findall("one|two|three|zero", read)) == 0


@pytest.mark.parametrize("rules", [english_rules, chinese_rules])
def test_each_rule_reads_what_its_pattern_finds(rules):
    """Every group of a pattern has a name: the scan counts on it."""
    for pattern, _ in rules.RULES:
        compiled = re.compile(pattern, re.ASCII)
        assert compiled.groups == len(compiled.groupindex), pattern


def test_the_engine_is_given_spans_and_no_sentence(monkeypatch):
    """It would escape the quotation marks and read "No." as a number."""
    given = []

    class Recorder:
        def __init__(self, language):
            self.engine = real(language)

        def normalize(self, written):
            given.append(written)
            return self.engine.normalize(written)

    real = engine._normalizer
    assert real("en").normalize('He said "No."') != 'He said "No."'
    monkeypatch.setattr(engine, "_normalizer", Recorder)
    engine.say.cache_clear()
    assert normalize('In January he said "No." 3 times.') == 'In January he said "No." three times.'
    normalize(MIXED)
    assert "3" in given
    assert all(re.fullmatch(r"[0-9:/.]{1,12}(?:st|nd|rd|th)?(?: ?[A-Za-z°/]{1,6}|元)?", span) for span in given), given


@pytest.mark.parametrize(
    "text", ["the rain in Spain falls mainly on the plain", "it is fine and we like it", "今天天气很好", "我们去公园吧"]
)
def test_on_plain_words_the_engine_agrees(text):
    """Leaving it out changes nothing."""
    language = "en" if text.isascii() else "zh"
    assert say(language, text) == text == normalize(text)


def test_plain_words_do_not_load_the_engine():
    code = (
        "import sys; from cosyq.text.normalize import normalize;"
        "normalize('Dr. Smith said: hello there, [laughter] etc. 你好，今天天气很好！'); assert 'wetext' not in sys.modules;"
        "normalize('3'); assert 'wetext' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_engine_is_named_and_not_replaced(monkeypatch):
    monkeypatch.setitem(sys.modules, "wetext", None)
    engine.say.cache_clear()
    engine._normalizer.cache_clear()
    try:
        with pytest.raises(UsageError, match=r"wetext cannot be imported.*--no-normalize") as caught:
            normalize("It takes 3 days.")
        assert caught.value.exit_code == 2
        assert normalize("It takes days.") == "It takes days."
    finally:
        engine._normalizer.cache_clear()


def test_the_engine_has_a_name():
    assert re.fullmatch(r"wetext \d+\.\d+\.\d+", engine_name())


@pytest.fixture(scope="module")
def tokenizer(artifact_of):
    return open_artifact(artifact_of("int8")).tokenizer()


def test_pieces_are_cut_from_what_is_said(tokenizer):
    text = "It weighs 123,456,789 kg and costs $987,654,321.12 in 2024. " * 20
    items = compose(text, "I have 3 dogs", tokenizer)
    digits = {tokenizer.encode(d)[0] for d in "0123456789"}
    assert not digits & {token for item in items for token in item.words}
    assert all(len(item.words) <= LONGEST + LONGEST // SHORT_TAIL for item in items)
    assert digits & set(items[0].prompt)  # the transcript is as it was given
    (raw,) = compose("I have 3 dogs", "", tokenizer, normalized=False)
    assert raw.words == tokenizer.encode("I have 3 dogs")


def seconds(text):
    started = time.thread_time()
    normalize(text)
    return time.thread_time() - started


MIXED = (
    "On January 5, 2024, Dr. Smith paid $12.50 for 3 kg. 我有2只猫，电话13800138000，约1/3的人。 "
    "See https://example.com/docs [laughter] or GPT-4o v2.0.1. "
)


@pytest.mark.parametrize(
    "unit",
    [
        "7",
        "1 ",
        "1.",
        "1,",
        "1-",
        "1:",
        "1/",
        "a",
        "a.",
        "a-",
        "aA",
        "a@",
        "A1",
        " ",
        "-",
        "#a ",
        "[",
        "好",
        "好1",
        "http://",
        MIXED,
    ],
)
def test_time_is_linear(unit):
    normalize("1 是2" + MIXED)  # the engine's own start is not counted
    short, long = (unit * (size // len(unit)) for size in (12_500, 50_000))
    first, last = (min(seconds(text) for _ in range(2)) for text in (short, long))
    assert last < 3
    assert last < 9 * first + 0.1  # 4 times the text; 16 times, were it quadratic


def test_long_runs_of_digits_never_reach_the_engine():
    assert seconds("It is " + "9" * 4096) < 0.2
    assert seconds("这是" + "9" * 4096) < 0.2


@pytest.mark.parametrize(
    "shape",
    [
        "{}/2",
        "2/{}",
        "${}",
        "{}.5",
        "{}-{}",
        "{}th",
        "{}%",
        "{} kg",
        "A{}",
        "{}:{}",
        "v{}.1",
        "{}年",
        "第{}",
        "¥{}",
        "#{}",
    ],
)
@pytest.mark.parametrize("start", ["it is ", "这是"])
def test_a_long_run_in_any_place_is_read(shape, start):
    """More digits than Python makes a number of."""
    text = start + shape.format("1" * 5000, "2" * 5000)
    assert not re.search("[0-9]", normalize(text))
    assert seconds(text) < 0.5


# ---- text that is still being written


def arrived(text: str) -> list[str]:
    return [piece for piece in normalize_arriving(text) if piece]


@pytest.mark.parametrize(
    "text",
    [
        "Well, we go to page 3-5 today. It costs $12.50, no more. And so on.",
        "No problem. No. 5 is alive. On Jan 5 we met Dr. Smith at 10:30 am.",
        "她说，我们有2个人，约1/3。然后3点见。好的！",
        "plain words only\nand a line\n\nand another",
        "",
    ],
)
def test_arriving_text_is_read_like_a_whole_one(text):
    assert "".join(arrived(text)) == normalize(text)


def test_plain_words_do_not_wait_for_the_sentence():
    seen = []

    def written():
        for character in "The first words come at once, and then 5 km":
            seen.append(character)
            yield character

    pieces = normalize_arriving(written())
    assert next(pieces) == "The "
    assert "".join(seen) == "The first "  # one word of foresight
    assert "".join(pieces) == "first words come at once, and then five kilometers"


def test_a_sentence_without_an_end_is_not_held_for_ever():
    pieces = arrived("5 " + "word " * 2000)
    assert max(map(len, pieces)) <= LONGEST_HELD + 10
    assert "".join(pieces).split() == ["five", *["word"] * 2000]


@given(st.text(alphabet="ab .,;:!?\n一，。", max_size=60))
def test_what_is_plain_arrives_as_it_is(text):
    assert "".join(arrived(text)) == text
