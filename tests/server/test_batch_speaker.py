"""The speaker over an engine of several requests at once: what it takes, what it tells, and how it rests."""

import asyncio
import json
import logging
import threading
import time

import numpy as np
import pytest
import torch

import cosyq
from cosyq.errors import DeviceError, UsageError
from cosyq.runtime.sound import Sound
from cosyq.server import batch
from cosyq.server.batch import BatchSpeaker
from cosyq.server.logs import JsonFormatter
from cosyq.server.speaker import BusyError, SpeechRequest, UnavailableError

TEXT = "hello world, the quick brown fox jumps over the lazy dog again"


class Slowed:
    """An engine, each of whose steps takes a while, and whose steps may fail."""

    def __init__(self, engine):
        self._engine, self.name, self.weights = engine, engine.name, engine.weights
        self.config, self.device = engine.config, engine.device
        self.embed, self.mels, self.sound = engine.embed, engine.mels, engine.sound
        self.flow_frames, self.growth = 0, engine.growth
        self.frames, self.prepare = engine.frames, engine.prepare
        self.delay, self.error, self.endless, self.steps = 0.0, None, False, 0

    def decoder(self, rows, **bounds):
        made = self._engine.decoder(rows, **bounds)
        step = made.step

        def slowly():
            time.sleep(self.delay)
            if self.error is not None:
                raise self.error
            if self.endless:
                made.minimum.fill_(100_000)
            self.steps += 1
            step()

        made.step = slowly
        return made


@pytest.fixture(scope="module")
def tts(artifact_of):
    return cosyq.load(artifact_of("int8"), device="cpu")


@pytest.fixture
def engine(tts):
    return Slowed(tts.engine)


def make(tts, engine, **options):
    failures = []
    made = BatchSpeaker(
        lambda: cosyq.Synthesizer(tts.artifact, engine),
        **{"rows": 2, "longest_queue": 2, "on_fatal": failures.append, **options},
    )
    made.failures = failures
    return made


@pytest.fixture
def speaker(tts, engine, monkeypatch):
    monkeypatch.setattr(batch, "WARM_UP", "a")
    made = make(tts, engine)
    yield made
    made.close()


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


def test_no_more_than_fit(speaker, engine):
    """Two are spoken at once, two wait, and a fifth is told when to come back."""

    async def ask():
        engine.delay = 0.01
        speeches = [speaker.submit(request("hello")) for _ in range(4)]
        await asyncio.gather(*(speech.started.wait() for speech in speeches[:2]))
        with pytest.raises(BusyError) as refusal:
            speaker.submit(request("hello"))
        assert refusal.value.retry_after > 0
        assert (speaker.stats().waiting, speaker.stats().active) == (2, 2)
        assert not speeches[2].started.is_set()
        speeches[2].cancel()  # who leaves the queue gives up the place at once
        assert speaker.stats().waiting == 1
        speeches.append(speaker.submit(request("hello")))
        engine.delay = 0.0
        await asyncio.gather(*(whole(speech) for speech in (*speeches[:2], *speeches[3:])))
        assert not speeches[2].began
        await asyncio.wait_for(speeches[2].released.wait(), 5)
        assert all(later.began >= one.began for one in speeches[:2] for later in speeches[3:])
        await asyncio.sleep(0.05)
        assert (speaker.stats().waiting, speaker.stats().active) == (0, 0)

    asyncio.run(ask())


@pytest.mark.parametrize("early", [True, False])
def test_a_cancelled_request_is_let_go_of_within_100_ms(speaker, engine, early):
    """Whether or not there was audio yet, and although no chunk ends in that time."""

    async def ask():
        engine.delay = 0.01
        speech = speaker.submit(request(TEXT * 4))
        await speech.started.wait()
        if not early:
            await anext(speech)
        await asyncio.sleep(0.05)
        speech.cancel()
        await asyncio.wait_for(speech.released.wait(), 5)
        assert speech.released_at - speech.cancelled_at < 0.1
        steps = engine.steps
        await asyncio.sleep(0.1)
        assert engine.steps == steps
        engine.delay = 0.0
        assert len(await whole(speaker.submit(request()))) > 1  # and the next one is spoken as ever

    asyncio.run(ask())


def test_runaway_speech_is_cut_in_proportion_to_the_text(speaker, engine):
    """A model that finds no end. The library's own bound is 0.8 seconds a text token, of which these letters have two."""
    engine.endless = True
    engine.mels = lambda chunks, **_: [torch.zeros(80, 2 * len(chunk.tokens)) for chunk in chunks]
    engine.sound = lambda mel, state, **_: Sound(torch.zeros(480 * mel.shape[1]), mel)
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
        good = speaker.submit(request())
        with pytest.raises(UsageError, match="nothing to say"):
            await whole(speaker.submit(request("...")))
        with pytest.raises(UsageError, match="unknown voice"):
            await whole(speaker.submit(SpeechRequest(TEXT, "nobody", 7)))
        assert await whole(good)

    asyncio.run(ask())
    assert not speaker.failures


def test_a_failed_device_is_the_end(speaker, engine):
    async def ask():
        engine.delay = 0.01
        speeches = [speaker.submit(request()) for _ in range(3)]
        await speeches[0].started.wait()
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


def test_closing_stops_what_is_spoken_and_what_waits(speaker, engine):
    async def ask():
        engine.delay = 0.01
        speeches = [speaker.submit(request(TEXT * 4)) for _ in range(3)]
        await speeches[0].started.wait()
        started = time.monotonic()
        await asyncio.to_thread(speaker.close)
        assert time.monotonic() - started < 1
        for speech in speeches:
            with pytest.raises(UnavailableError):
                await whole(speech)

    asyncio.run(ask())
    assert not [thread for thread in threading.enumerate() if thread is speaker._engine._thread]


def test_it_describes_itself(speaker):
    about = speaker.about()
    assert about["quantization"] == {"llm": "int8", "flow": "int8", "vocoder": "fp32"}
    assert (about["device"], about["max_concurrency"], about["loaded"]) == ("cpu", 2, True)
    assert about["load_seconds"] > 0
    assert speaker.voices() == ["neutral"]
    assert speaker.stats().memory_bytes == 0


def test_an_engine_that_nobody_uses_is_let_go_of_and_comes_back(tts, engine, monkeypatch, caplog):
    monkeypatch.setattr(batch, "WARM_UP", "a")
    with caplog.at_level(logging.INFO):
        speaker = make(tts, engine, idle=0.3)
        try:
            deadline = time.monotonic() + 10
            while speaker.about()["loaded"]:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert speaker._engine is None
            assert speaker.voices() == ["neutral"]

            async def ask():
                speeches = [speaker.submit(request(seed=seed)) for seed in (1, 2, 3)]
                assert speaker.stats().waiting == 3
                speeches[2].cancel()
                return [await whole(speech) for speech in speeches[:2]]

            heard = asyncio.run(ask())
        finally:
            speaker.close()
    for seed, chunks in zip((1, 2), heard, strict=True):
        expected = [audio.samples for audio in tts.stream(TEXT, voice="neutral", seed=seed)]
        np.testing.assert_array_equal(np.concatenate([c.samples for c in chunks]), np.concatenate(expected))
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    memory = [line for line in lines if line["message"] == "memory"]
    assert [line["at"] for line in memory][:6] == ["start", "loaded", "ready", "unloaded", "loaded", "ready"]
    assert memory[1]["llm_bytes"] > 1e6
    assert memory[5]["load_seconds"] > 0


def test_an_engine_that_does_not_come_back_is_told(tts, engine, monkeypatch):
    monkeypatch.setattr(batch, "WARM_UP", "a")
    speaker = make(tts, engine, idle=0.2)
    deadline = time.monotonic() + 10
    while speaker.about()["loaded"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    engine.error = DeviceError("out of memory")

    async def ask():
        with pytest.raises(DeviceError, match="out of memory"):
            await whole(speaker.submit(request()))
        engine.error = None
        return await whole(speaker.submit(request()))

    assert asyncio.run(ask())
    speaker.close()
