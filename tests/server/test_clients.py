"""Voice frameworks that speak OpenAI's protocol, as they come: LiveKit Agents, Pipecat, and Home Assistant's Wyoming.

They bring hundreds of megabytes along, so a test is skipped where its client is missing. To run them, in a copy of the
environment: pip install livekit-plugins-openai pipecat-ai wyoming. The bridge from Wyoming to OpenAI's protocol needs
Python 3.12; COSYQ_WYOMING_OPENAI is the command that starts it, such as `/elsewhere/bin/python -m wyoming_openai`.
"""

import asyncio
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter

import pytest
from serving import Process, scripted, tone, wait_for

from cosyq.errors import DeviceError

TEXT = "My grandmother used to bake bread every Saturday. Thank you very much."
LONG = " ".join([TEXT] * 5)
MADE = "cosyq_audio_seconds_total"


@pytest.fixture(scope="module")
def server(mini_artifact, tmp_path_factory):
    process = Process(mini_artifact, tmp_path_factory.mktemp("served"))
    yield process
    assert process.stop() == 0


def base(server):
    return f"http://127.0.0.1:{server.port}/v1"


def outcomes(server):
    return Counter({name: server.metric(f'cosyq_requests_total{{outcome="{name}"}}') for name in ("ok", "cancelled")})


class Heard:
    """What a client has got, beside what the server has made meanwhile."""

    def __init__(self, server):
        self._server, self._made, self._outcomes = server, server.metric(MADE), outcomes(server)
        self._started = time.monotonic()
        self.first = self.seconds = 0.0

    def add(self, seconds):
        self.first = self.first or time.monotonic() - self._started
        self.seconds += seconds

    def is_whole(self):
        took = time.monotonic() - self._started
        assert outcomes(self._server) - self._outcomes == {"ok": 1}
        made = self._server.metric(MADE) - self._made
        assert made > 3
        assert self.seconds == pytest.approx(made, abs=0.05)
        assert self.first < 0.6 * took

    def was_cancelled(self):
        """Before much was made of what would be 25 s."""
        wait_for(lambda: outcomes(self._server) - self._outcomes == {"cancelled": 1})
        wait_for(lambda: self._server.metric("cosyq_active_requests") == 0)
        assert self._server.metric(MADE) - self._made < 15


# ---- LiveKit Agents


@pytest.fixture
def livekit():
    return pytest.importorskip("livekit.plugins.openai")


async def listen_to(tts, text, add, enough=float("inf")):
    seconds = 0.0
    stream = tts.synthesize(text)
    try:
        async for audio in stream:
            assert (audio.frame.sample_rate, audio.frame.num_channels) == (24_000, 1)
            add(audio.frame.duration)
            seconds += audio.frame.duration
            if seconds > enough:
                break
    finally:
        await stream.aclose()
        await tts.aclose()


@pytest.mark.parametrize("model", ["gpt-4o-mini-tts", "tts-1"])  # of which it asks for events, and for audio
@pytest.mark.parametrize("format", ["mp3", "pcm", "opus"])
def test_livekit_hears_all_of_it_as_it_is_made(livekit, server, model, format):
    heard = Heard(server)
    tts = livekit.TTS(base_url=base(server), api_key="any", model=model, voice="ash", response_format=format)
    asyncio.run(listen_to(tts, TEXT, heard.add))
    heard.is_whole()


def test_livekit_interrupts(livekit, server):
    heard = Heard(server)
    asyncio.run(listen_to(livekit.TTS(base_url=base(server), api_key="any"), LONG, heard.add, enough=0.1))
    heard.was_cancelled()


def test_livekit_is_told_what_is_wrong(livekit, server):
    from livekit.agents import APIStatusError

    with pytest.raises(APIStatusError, match="there is no voice 'nobody'") as refusal:
        asyncio.run(listen_to(livekit.TTS(base_url=base(server), api_key="any", voice="nobody"), TEXT, print))
    assert (refusal.value.status_code, refusal.value.retryable) == (400, False)


@pytest.mark.parametrize("model", ["gpt-4o-mini-tts", "tts-1"])
def test_livekit_takes_no_part_for_the_whole(livekit, model):
    """It reads no `speech.audio.error`: only a stream that breaks tells it."""
    from livekit.agents import APIConnectionError

    def script(speech):
        speech.put(tone(1.0))
        time.sleep(0.2)
        raise DeviceError("out of memory")

    with scripted(script) as (server, speaker):
        tts = livekit.TTS(base_url=base(server), api_key="any", model=model, response_format="pcm")
        with pytest.raises(APIConnectionError):
            asyncio.run(listen_to(tts, TEXT, lambda seconds: None))
        assert len(speaker.requests) > 1  # and it has tried again


# ---- Pipecat


@pytest.fixture
def pipecat():
    pytest.importorskip("pipecat")
    from pipecat.services.openai import tts

    return tts


def run_pipeline(module, server, *frames, **settings):
    """Frames through a pipeline of speech alone -> (audio frames, errors)."""
    from pipecat.frames.frames import ErrorFrame, TTSAudioRawFrame
    from pipecat.pipeline.worker import PipelineParams
    from pipecat.tests.utils import run_test

    async def go():
        service = module.OpenAITTSService(
            api_key="any", base_url=base(server), settings=module.OpenAITTSService.Settings(**settings)
        )
        parameters = PipelineParams(audio_out_sample_rate=24_000)
        return await run_test(service, frames_to_send=frames, pipeline_params=parameters)

    down, up = asyncio.run(go())
    return [f for f in down if isinstance(f, TTSAudioRawFrame)], [f for f in up if isinstance(f, ErrorFrame)]


def test_pipecat_hears_all_of_it(pipecat, server):
    from pipecat.frames.frames import TTSSpeakFrame

    heard = Heard(server)
    audio, errors = run_pipeline(pipecat, server, TTSSpeakFrame(TEXT), model="tts-1", voice="ash")
    assert {(frame.sample_rate, frame.num_channels) for frame in audio} == {(24_000, 1)}
    assert len(audio) > 3
    for frame in audio:
        heard.add(len(frame.audio) / 48_000)
    heard.first = 0.0  # frames are handed over at the end here
    heard.is_whole()
    assert not errors


def test_pipecat_interrupts(pipecat, server):
    from pipecat.frames.frames import InterruptionFrame, TTSSpeakFrame
    from pipecat.tests.utils import SleepFrame

    heard = Heard(server)
    run_pipeline(pipecat, server, TTSSpeakFrame(LONG), SleepFrame(1.5), InterruptionFrame())
    heard.was_cancelled()


def test_pipecat_is_told_what_is_wrong(pipecat, server):
    from pipecat.frames.frames import TTSSpeakFrame

    audio, errors = run_pipeline(pipecat, server, TTSSpeakFrame("..."))
    assert not audio
    assert "nothing to say" in errors[0].error


# ---- Home Assistant: the client that it is, and the bridge between


@pytest.fixture(scope="module", params=["OPENAI", "KOKORO_FASTAPI"])
def bridge(server, request):
    """A bridge that offers OpenAI's voices, or asks the server for its own; gives its port."""
    pytest.importorskip("wyoming")
    command = os.environ.get("COSYQ_WYOMING_OPENAI")
    if command is None and sys.version_info >= (3, 12):
        pytest.importorskip("wyoming_openai")
        command = f"{sys.executable} -m wyoming_openai"
    if command is None:
        pytest.skip("needs COSYQ_WYOMING_OPENAI")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = (
        f"--uri tcp://127.0.0.1:{port} --tts-openai-url {base(server)} --tts-streaming-models tts-1 --languages en"
    )
    command = [*shlex.split(f"{command} {options}"), "--tts-backend", request.param]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def listens():
        assert process.poll() is None
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", port)) == 0

    wait_for(listens, 60)
    yield request.param, port
    process.send_signal(signal.SIGTERM)
    process.wait(20)


async def hold(port, events, until, add=lambda seconds: None):
    """Send events and read what comes, up to one of a type in `until` -> all that came, audio only counted."""
    from wyoming.audio import AudioChunk
    from wyoming.client import AsyncTcpClient

    came = []
    async with AsyncTcpClient("127.0.0.1", port) as client:
        for event in events:
            await client.write_event(event)
        while (event := await asyncio.wait_for(client.read_event(), 60)) is not None:
            came.append(event)
            if AudioChunk.is_type(event.type):
                chunk = AudioChunk.from_event(event)
                assert (chunk.rate, chunk.width, chunk.channels) == (24_000, 2, 1)
                add(len(chunk.audio) / 48_000)
            if event.type in until:
                return came
    raise AssertionError("the bridge has left")


def test_home_assistant_is_offered_the_voices(bridge):
    from wyoming.info import Describe, Info

    (event,) = asyncio.run(hold(bridge[1], [Describe().event()], {"info"}))
    (program,) = Info.from_event(event).tts
    assert program.supports_synthesize_streaming
    names = {voice.name for voice in program.voices}
    if bridge[0] == "OPENAI":
        assert {"alloy", "shimmer"} < names
    else:
        assert names == {"default", "iris", "magnus", "nora", "pip"}


def spoken_by(bridge):
    from wyoming.tts import SynthesizeVoice

    return SynthesizeVoice(name="shimmer" if bridge[0] == "OPENAI" else "magnus")


def test_home_assistant_hears_all_of_it_as_it_is_made(bridge, server):
    from wyoming.tts import Synthesize

    heard = Heard(server)
    said = Synthesize(text=TEXT, voice=spoken_by(bridge)).event()
    asyncio.run(hold(bridge[1], [said], {"audio-stop", "error"}, heard.add))
    heard.is_whole()


def test_home_assistant_streams_an_answer_that_is_still_written(bridge, server):
    from wyoming.tts import SynthesizeChunk, SynthesizeStart, SynthesizeStop

    made, heard = server.metric(MADE), Heard(server)
    words = [SynthesizeChunk(text=f"{word} ").event() for word in TEXT.split()]
    events = [SynthesizeStart(voice=spoken_by(bridge)).event(), *words, SynthesizeStop().event()]
    asyncio.run(hold(bridge[1], events, {"synthesize-stopped", "error"}, heard.add))
    assert heard.seconds == pytest.approx(server.metric(MADE) - made, abs=0.05)
    assert heard.seconds > 3


def test_home_assistant_is_told_of_failure(bridge):
    from wyoming.tts import Synthesize

    said = Synthesize(text="...", voice=spoken_by(bridge)).event()
    assert asyncio.run(hold(bridge[1], [said], {"audio-stop", "error"}))[-1].type == "error"


def test_home_assistant_leaves(bridge, server):
    from wyoming.tts import Synthesize

    heard = Heard(server)
    said = Synthesize(text=LONG, voice=spoken_by(bridge)).event()
    asyncio.run(hold(bridge[1], [said], {"audio-chunk"}))
    heard.was_cancelled()
