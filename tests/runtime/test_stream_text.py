"""Speaking a text that is still being written."""

import queue
import random
import threading
import time

import numpy as np
import pytest

import cosyq
from cosyq.errors import UsageError
from cosyq.runtime.decode import Part
from cosyq.text.split import LONGEST
from cosyq.voices.voice import Voice

TEXT = "hello world, the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def tts(artifact_of):
    return cosyq.load(artifact_of("int8"), device="cpu")


def joined(chunks):
    return np.concatenate([chunk.samples for chunk in chunks])


def cuts(text, seed):
    rng = random.Random(seed)
    while text:
        size = rng.randrange(1, 6)
        yield text[:size]
        text = text[size:]


def test_the_audio_depends_on_the_text_and_not_on_its_pieces(tts, voice):
    whole = list(tts.stream_text([TEXT], voice=voice, seed=7))
    assert len(whole) > 1
    for seed in range(3):
        assert np.array_equal(joined(whole), joined(tts.stream_text(cuts(TEXT, seed), voice=voice, seed=7)))
    assert not np.array_equal(joined(whole), joined(tts.stream_text([TEXT], voice=voice, seed=8)))
    last = whole[-1]
    assert (last.text, last.seed, last.timings.finish) == (TEXT, 7, "stop")
    assert last.timings.text_tokens == len(tts.requests._tokenizer.encode(TEXT))
    assert last.timings.audio_seconds == pytest.approx(len(joined(whole)) / 24000)
    assert 2 * last.timings.text_tokens <= last.timings.speech_tokens <= 20 * last.timings.text_tokens


def test_the_beginning_is_heard_while_the_text_still_waits(tts):
    """The writer is another thread, which writes on only after the first audio has been heard."""
    written, heard, taken = queue.Queue(), queue.Queue(), []

    def pieces():
        while (piece := written.get(timeout=180)) is not None:
            taken.append(piece)
            yield piece

    def speak():
        for chunk in tts.stream_text(pieces(), seed=1):
            heard.put(chunk)
        heard.put(None)

    threading.Thread(target=speak, daemon=True).start()
    written.put("hello world, the quick brown fox ")
    first = heard.get(timeout=180)
    assert len(first.samples)
    assert len(taken) == 1
    assert "hello world, the quick brown fox".startswith(first.text)
    for piece in ("jumps over ", "the lazy dog", None):
        written.put(piece)
    rest = []
    while (chunk := heard.get(timeout=180)) is not None:
        rest.append(chunk)
    assert rest[-1].text == TEXT
    assert np.array_equal(joined([first, *rest]), joined(tts.stream_text([TEXT], seed=1)))


def test_closing_it_stops_the_work(tts):
    asked = []

    def endless():
        while True:
            asked.append(1)
            yield "the quick brown fox "

    stream = tts.stream_text(endless(), seed=1)
    next(stream)
    count = len(asked)
    stream.close()
    assert len(asked) == count < 30
    with pytest.raises(StopIteration):
        next(stream)


def test_an_endless_text_is_stopped_at_the_limit(tts, monkeypatch):
    monkeypatch.setattr("cosyq.text.arriving.MAX_CHARACTERS", 60)
    with pytest.raises(UsageError, match="characters are too many"):
        list(tts.stream_text(iter(lambda: "the fox ", None), seed=1))


def test_waiting_for_text_is_not_counted_as_work(tts, monkeypatch):
    ahead, real = [0], time.perf_counter
    monkeypatch.setattr("cosyq.runtime.synthesizer.time.perf_counter", lambda: real() + ahead[0])

    def slowly():
        for piece in (TEXT[:40], TEXT[40:]):
            ahead[0] += 10_000
            yield piece

    *_, last = tts.stream_text(slowly(), seed=1)
    t = last.timings
    assert 20_000 <= t.waited_seconds < t.total_seconds
    assert t.token_seconds < 5_000
    assert t.real_time_factor == pytest.approx((t.total_seconds - t.waited_seconds) / t.audio_seconds)


def test_what_is_wrong_is_said_when_it_is_known(tts):
    with pytest.raises(UsageError, match=r"from 0\.5 to 2\.0"):
        tts.stream_text(["hello"], speed=3)  # before the first chunk is asked for
    with pytest.raises(UsageError, match="no letter"):
        tts.stream_text(["hello"], instruct="...")
    for nothing in ([], ["", " ", "..."]):
        stream = tts.stream_text(nothing)
        with pytest.raises(UsageError, match="nothing to say"):
            next(stream)
    stream = tts.stream_text([TEXT, "\udcff"], seed=1)
    with pytest.raises(UsageError, match="not valid UTF-8"):
        list(stream)


def test_utterances_and_pauses(tts, voice):
    long = f"{TEXT}. " * 5
    text = f"hello there.\n\n{long}\n\nthe end"
    chunks = list(tts.stream_text(cuts(text, 1), voice=voice, seed=4, speed=2.0))
    texts = {chunk.utterance: chunk.text for chunk in chunks}
    assert list(texts) == list(range(len(texts)))
    assert " ".join(texts.values()) == " ".join(text.split())
    assert texts[0] == "hello there."
    assert list(texts.values())[-1] == "the end"
    assert all(len(tts.requests._tokenizer.encode(said)) < 2 * LONGEST for said in texts.values())
    pauses = [(chunk.utterance, chunk.pause) for chunk in chunks if chunk.pause]
    assert pauses == [(0, 9600), (len(texts) - 2, 9600)]
    assert all(not chunk.samples.any() for chunk in chunks if chunk.pause)
    # Each is what it would be alone, with the seed it got.
    alone = joined(tts.stream_text(["the end"], voice=voice, seed=4 + len(texts) - 1, speed=2.0))
    assert np.array_equal(alone, joined(c for c in chunks if c.utterance == len(texts) - 1))


def test_the_modes_decide_what_stands_before_the_text(tts, voice, monkeypatch):
    frames = []

    def capture(frame, text):
        frames.append(frame)
        return iter([Part(((list(text), []),), 9, 9)])

    monkeypatch.setattr(tts.requests, "parts", capture)

    def frame(chosen, **options):
        assert list(tts.stream_text([TEXT], voice=chosen, **options))
        return frames[-1].head, frames[-1].transcript, frames[-1].prompt

    encode, speech = tts.requests._tokenizer.encode, voice.prompt_tokens.tolist()
    system = encode("You are a helpful assistant.<|endofprompt|>")
    short = Voice("short", voice.speaker, voice.prompt_tokens, voice.prompt_mel, "hi")
    assert frame(short) == (system, encode("hi"), speech)
    own = Voice("own", voice.speaker, voice.prompt_tokens, voice.prompt_mel, "Be calm.<|endofprompt|>hi")
    assert frame(own) == (encode("Be calm.<|endofprompt|>"), encode("hi"), speech)
    assert frame(short, cross_lingual=True) == (system, [], [])
    slowly = encode("You are a helpful assistant. speak slowly<|endofprompt|>")
    assert frame(short, instruct="speak slowly") == (slowly, [], [])
    wordy = Voice("wordy", voice.speaker, voice.prompt_tokens, voice.prompt_mel, "hello there " * 4)
    assert frame(wordy) == (system, [], [])  # more text than its share of the blocks: the rest would be spoken
    assert 20 * frames[-1].longest <= frames[-1].room
    assert (frames[-1].least, frames[-1].most) == (2, 20)


def test_a_recording_goes_in_front(tts, voice):
    """With a prompt that fits, in the interleaved order itself and not only in the flow."""
    short = Voice("short", voice.speaker, voice.prompt_tokens, voice.prompt_mel, "hi")
    with_prompt = list(tts.stream_text([TEXT], voice=short, seed=3))
    without = list(tts.stream_text([TEXT], voice=short, seed=3, cross_lingual=True))
    assert not np.array_equal(joined(with_prompt), joined(without))
    assert with_prompt[-1].timings.finish in ("stop", "length")
