"""The speaker over today's synthesizer: in order, one at a time, stopped between two tokens."""

import asyncio
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
import torch

import cosyq
from cosyq.errors import DeviceError, UsageError
from cosyq.server import single
from cosyq.server.single import SingleSpeaker
from cosyq.server.speaker import BusyError, SpeechRequest, UnavailableError

TEXT = "hello world, the quick brown fox jumps over the lazy dog again"


class Slowed:
    """An engine, each of whose tokens takes a while, and may fail."""

    def __init__(self, engine):
        self._engine, self.name = engine, engine.name
        self.config, self.device = engine.config, engine.device
        self.delay, self.error = 0.0, None
        self.tokens = 0
        self.mel, self.samples = engine.mel, engine.samples

    def speech_tokens(self, text, prompt, **options):
        tokens = self._engine.speech_tokens(text, prompt, **options)
        while True:
            try:
                token = next(tokens)
            except StopIteration as stop:
                return stop.value
            time.sleep(self.delay)
            if self.error is not None:
                raise self.error
            self.tokens += 1
            yield token


@pytest.fixture(scope="module")
def tts(artifact_of):
    return cosyq.load(artifact_of("int8"), device="cpu")


@pytest.fixture
def engine(tts):
    return Slowed(tts.engine)


@pytest.fixture
def speaker(tts, engine, monkeypatch):
    monkeypatch.setattr(single, "WARM_UP", "a")
    failures = []
    made = SingleSpeaker(cosyq.Synthesizer(tts.artifact, engine), longest_queue=2, on_fatal=failures.append)
    made.failures = failures
    yield made
    made.close()
    assert not made._thread.is_alive()


def request(text=TEXT, **fields):
    return SpeechRequest(text, "neutral", **{"seed": 7, **fields})


async def whole(speech):
    return [chunk async for chunk in speech]


def test_what_is_heard_is_what_the_library_says(tts, speaker):
    async def ask():
        return await whole(speaker.submit(request(speed=1.5)))

    chunks = asyncio.run(ask())
    expected = [audio.samples for audio in tts.stream(TEXT, voice="neutral", seed=7, speed=1.5)]
    assert len(chunks) == len(expected) > 1
    for chunk, samples in zip(chunks, expected, strict=True):
        np.testing.assert_array_equal(chunk.samples, samples)
    assert chunks[-1].finish == "stop"
    assert 0 < chunks[0].speech_tokens < chunks[-1].speech_tokens


def test_instructions_and_normalization_reach_the_model(speaker):
    async def ask():
        requests = [request(), request(instruct="speak slowly"), request("it costs $12"), request("it costs $12")]
        requests[3] = SpeechRequest("it costs $12", "neutral", 7, normalize=False)
        return [(await whole(speaker.submit(one)))[-1] for one in requests]

    plain, slowly, read, unread = asyncio.run(ask())
    assert plain.text_tokens == slowly.text_tokens
    assert plain.speech_tokens != slowly.speech_tokens
    assert read.text_tokens > unread.text_tokens


def test_first_come_first_served_and_no_more_than_fit(speaker, engine):
    async def ask():
        engine.delay = 0.01
        speeches = [speaker.submit(request("hello"))]
        await speeches[0].started.wait()
        speeches += [speaker.submit(request("hello")) for _ in range(2)]
        with pytest.raises(BusyError) as refusal:
            speaker.submit(request("hello"))
        assert refusal.value.retry_after > 0
        assert (speaker.stats().waiting, speaker.stats().active) == (2, 1)
        assert not speeches[1].started.is_set()
        speeches[1].cancel()  # who leaves the queue gives up the place at once
        assert speaker.stats().waiting == 1
        speeches.append(speaker.submit(request("hello")))
        await asyncio.gather(*(whole(speech) for speech in (speeches[0], *speeches[2:])))
        await asyncio.sleep(0.05)
        began = [speech.began for speech in (speeches[0], *speeches[2:])]
        assert began == sorted(began)
        assert all(later.began >= one.ended for one, later in pairwise(speeches[2:]))
        assert not speeches[1].began
        assert speeches[1].released.is_set()
        assert (speaker.stats().waiting, speaker.stats().active) == (0, 0)

    asyncio.run(ask())


@pytest.mark.parametrize("early", [True, False])
def test_a_cancelled_request_is_let_go_of_within_100_ms(speaker, engine, early):
    """Whether or not there was audio yet, and although no chunk ends in that time."""

    async def ask():
        engine.delay, engine.tokens = 0.01, 0
        speech = speaker.submit(request(TEXT * 4))
        await speech.started.wait()
        if not early:
            await anext(speech)
        await asyncio.sleep(0.05)
        speech.cancel()
        await asyncio.wait_for(speech.released.wait(), 5)
        assert speech.released_at - speech.cancelled_at < 0.1
        spoken = engine.tokens
        engine.delay = 0.0
        assert len(await whole(speaker.submit(request()))) > 1  # and the next one is spoken as ever
        return spoken

    spoken = asyncio.run(ask())
    assert spoken < 100


def test_runaway_speech_is_cut_in_proportion_to_the_text(speaker, engine):
    """A model that finds no end. The library's own bound is 0.8 seconds a text token, of which these letters have two."""

    def endless(text, prompt, *, minimum, maximum, generator):
        yield from [100] * maximum
        return "length"

    engine.speech_tokens = endless
    engine.mel = lambda tokens, voice, **_: torch.zeros(80, 2 * len(tokens))
    engine.samples = lambda mel, state, final: torch.zeros(480 * mel.shape[1])
    text = "ŵŷ" * 4

    async def ask():
        return await whole(speaker.submit(request(text, normalize=False)))

    chunks = asyncio.run(ask())
    seconds = sum(len(chunk.samples) for chunk in chunks) / speaker.sample_rate
    assert request(text).longest_seconds == pytest.approx(4.0 + 0.4 * len(text))
    assert seconds == pytest.approx(request(text).longest_seconds, abs=1e-4)
    assert chunks[-1].finish == "length"


@pytest.mark.parametrize(
    ("text", "seconds"), [("hello", 6.0), ("你好", 5.6), ("42", 5.6), ("a" * 100, 44.0), ("hello ½", 7.2)]
)
def test_the_longest_audio_of_a_text(text, seconds):
    assert request(text).longest_seconds == pytest.approx(seconds)
    assert request(text, speed=2.0).longest_seconds == pytest.approx(seconds / 2)


def test_what_cannot_be_spoken_fails_alone(speaker, engine):
    async def ask():
        with pytest.raises(UsageError, match="nothing to say"):
            await whole(speaker.submit(request("...")))
        with pytest.raises(UsageError, match="unknown voice"):
            await whole(speaker.submit(SpeechRequest(TEXT, "nobody", 7)))
        for error, expected in (
            (DeviceError("not finite"), "not finite"),
            (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
            (ValueError("secret text"), "internal error: ValueError$"),
        ):
            engine.error = error
            with pytest.raises(Exception, match=expected):
                await whole(speaker.submit(request()))
        engine.error = None
        assert await whole(speaker.submit(request()))

    asyncio.run(ask())
    assert not speaker.failures


def test_a_failed_device_is_the_end(speaker, engine):
    async def ask():
        engine.delay = 0.01
        speeches = [speaker.submit(request())]
        await speeches[0].started.wait()
        speeches.append(speaker.submit(request()))
        engine.error = RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        for speech in speeches:
            with pytest.raises(UnavailableError):
                await whole(speech)
            await asyncio.wait_for(speech.released.wait(), 5)
        with pytest.raises(UnavailableError):
            speaker.submit(request())

    asyncio.run(ask())
    (error,) = speaker.failures
    assert isinstance(error, DeviceError)
    assert "illegal memory access" in str(error)
    assert "more" not in str(error)


def test_closing_stops_what_is_spoken_and_what_waits(speaker, engine):
    async def ask():
        engine.delay = 0.01
        speeches = [speaker.submit(request(TEXT * 4)) for _ in range(2)]
        await speeches[0].started.wait()
        started = time.monotonic()
        await asyncio.to_thread(speaker.close)
        assert time.monotonic() - started < 1
        for speech in speeches:
            with pytest.raises(UnavailableError):
                await whole(speech)

    asyncio.run(ask())
    assert not [thread for thread in threading.enumerate() if thread.name == "speaker" and thread is speaker._thread]


def test_it_describes_itself(speaker):
    about = speaker.about()
    assert about["quantization"] == {"llm": "int8", "flow": "int8", "vocoder": "fp32"}
    assert about["device"] == "cpu"
    assert speaker.voices() == ["neutral"]
    assert speaker.stats().memory_bytes == 0
