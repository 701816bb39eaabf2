import pytest

from cosyq.artifact.reader import open_artifact
from cosyq.errors import UsageError
from cosyq.text.prompt import SYSTEM, compose, speakable
from cosyq.text.tokenizer import END_OF_PROMPT


@pytest.fixture(scope="module")
def tokenizer(artifact_of):
    return open_artifact(artifact_of("int8")).tokenizer()


def test_the_marker_is_always_there_and_once(tokenizer):
    for text, transcript in (
        ("hello", ""),
        ("hello", "there"),
        (f"slowly{END_OF_PROMPT}hello", "there"),
        ("hello", f"x{END_OF_PROMPT}there"),
    ):
        (prompted,) = compose(text, transcript, tokenizer)
        assert (prompted.prompt + prompted.words).count(tokenizer.end_of_prompt) == 1
        assert prompted.words == tokenizer.encode("hello")


def test_a_transcript_goes_with_the_prompt_s_speech(tokenizer):
    (with_transcript,) = compose("hello", "there", tokenizer)
    assert with_transcript.with_speech
    assert with_transcript.prompt == tokenizer.encode(f"{SYSTEM}{END_OF_PROMPT}there")
    assert not compose("hello", "", tokenizer)[0].with_speech
    assert not compose(f"slowly{END_OF_PROMPT}hello", "there", tokenizer)[0].with_speech


@pytest.mark.parametrize("text", ["", "   ", "\n\t", "\x00\x01\x7f\u200b", "?!...", f"slowly{END_OF_PROMPT}", "🙂"])
def test_nothing_to_say(text):
    with pytest.raises(UsageError, match="nothing to say"):
        speakable(text)


def test_too_long_and_not_text():
    with pytest.raises(UsageError, match="100000 characters are too many"):
        speakable("a" * 100_000)
    with pytest.raises(UsageError, match="not valid UTF-8"):
        speakable("a\udcff")


def test_control_characters_are_dropped_and_lines_kept():
    assert speakable("\x00he\x07llo\t\nyou\r\nall\r\n") == "hello \nyou\nall"


def test_every_piece_of_a_long_text_gets_the_prompt(tokenizer):
    text = "One sentence, not short at all, is said here. " * 8 + "\n\n...\n\nThe end."
    items = compose(text, "there", tokenizer)
    assert len(items) > 3
    assert all(item.prompt == items[0].prompt for item in items)
    assert all(0 < len(item.words) < 100 for item in items)
    assert items[-1].words == tokenizer.encode("The end.")  # and the dots between are not spoken
    assert [item.ends_paragraph for item in items].count(True) == 2
