import re

from hypothesis import given
from hypothesis import strategies as st

from cosyq.text.subtitles import Subtitles


def test_chunks_of_an_utterance_are_one_cue_and_its_pause_is_none_of_it():
    subtitles = Subtitles(24_000)
    subtitles.add(0, "Hel", 24_000, 0)
    subtitles.add(0, "Hello.", 12_012, 0)
    subtitles.add(0, "Hello.", 9_600, 9_600)
    subtitles.add(1, "你好。", 24_000 * 3661, 1_000)
    assert subtitles.to_srt() == (
        "1\n00:00:00,000 --> 00:00:01,500\nHello.\n\n2\n00:00:01,900 --> 01:01:02,858\n你好。\n"
    )


@given(st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 10_000)), min_size=1, max_size=20))
def test_cues_follow_each_other(chunks):
    subtitles = Subtitles(24_000)
    for number, (speech, pause) in enumerate(chunks):
        subtitles.add(number, "x", speech + pause, pause)
    times = [
        (int(h) * 3600 + int(m) * 60 + int(s)) * 1000 + int(ms)
        for h, m, s, ms in re.findall(r"(\d\d):(\d\d):(\d\d),(\d\d\d)", subtitles.to_srt())
    ]
    assert times == sorted(times)
    total = sum(speech + pause for speech, pause in chunks) - chunks[-1][1]
    assert abs(times[-1] - total / 24) <= 1


def test_nothing_said_is_an_empty_file():
    assert Subtitles(24_000).to_srt() == ""
