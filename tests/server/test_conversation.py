"""Text in and audio out over a WebSocket, with a real client."""

import itertools
import json
import threading
import time

import numpy as np
import pytest
from serving import RATE, Scripted, decoded, running, says, scripted, tone, until_cancelled, wait_for
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

import cosyq
from cosyq.audio.sinks import to_s16
from cosyq.server.batch import BatchSpeaker
from cosyq.server.speaker import BusyError, Chunk

CREATE = {"type": "speech.create", "model": "tts-1", "voice": "alloy"}


def url(server):
    return f"ws://127.0.0.1:{server.port}/v1/audio/speech"


class Client:
    def __init__(self, server, **options):
        self.connection = connect(url(server), **options)
        self.socket = self.connection.__enter__()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.connection.__exit__(*error)

    def send(self, *messages):
        for message in messages:
            self.socket.send(
                json.dumps({"type": "input_text.append", "text": message} if isinstance(message, str) else message)
            )

    def done(self):
        self.send({"type": "input_text.done"})

    def message(self):
        received = self.socket.recv(timeout=60)
        return received if isinstance(received, bytes) else json.loads(received)

    def rest(self):
        """(audio, JSON messages, close code) to the end."""
        audio, messages = b"", []
        while True:
            try:
                message = self.message()
            except ConnectionClosed as closed:
                return audio, messages, closed.rcvd.code
            if isinstance(message, bytes):
                audio += message
            else:
                messages.append(message)


def refusal(server, *messages):
    with Client(server) as client:
        client.send(*messages)
        audio, messages, code = client.rest()
        assert not audio
        assert messages[-1]["type"] == "speech.audio.error"
        return messages[-1]["error"], code


def reads(speech):
    """A script that says a word for a word, as they come."""
    for count in itertools.count(1):
        piece = next(speech.request.text, None)
        if piece is None:
            break
        speech.put(Chunk(tone(0.1).samples, count, 3 * count, "", 0, piece))
    speech.put(Chunk(tone(0.1).samples, count, 3 * count, "stop", 0, "end"))


def test_audio_comes_while_text_still_does():
    with scripted(reads) as (server, speaker), Client(server) as client:
        client.send({**CREATE, "seed": 7, "voice": "iris", "timestamps": True}, "Hello ")
        assert client.message() == {"type": "speech.created", "seed": 7}
        assert len(client.message()) == 2 * RATE // 10
        client.send("there.")
        assert len(client.message()) == 2 * RATE // 10
        client.done()
        audio, messages, code = client.rest()
        assert len(audio) == 2 * RATE // 10
        (done,) = messages
        assert done["type"] == "speech.audio.done"
        assert done["usage"] == {"input_tokens": 3, "output_tokens": 9, "total_tokens": 12}
        assert done["segments"] == [{"text": "end", "start": 0.0, "end": 0.3}]
        assert code == 1000
        assert speaker.requests[0].voice == "iris"
        assert server.metric("cosyq_input_characters_total") == 12
        assert server.metric('cosyq_requests_total{outcome="ok"}') == 1
        assert server.metric("cosyq_first_audio_seconds_count") == 1


@pytest.mark.parametrize("format", ["mp3", "wav"])
def test_it_speaks_other_formats(format):
    with scripted(says(tone(0.5), tone(0.5))) as (server, _), Client(server) as client:
        client.send({**CREATE, "response_format": format, "speed": 4.0}, "Hello.")
        client.done()
        samples, rate = decoded(client.rest()[0], format)
        assert len(samples) / rate == pytest.approx(0.5, abs=0.05)


def test_what_will_not_do_is_told():
    with scripted(says(tone(0.5)), max_characters=20) as (server, speaker):
        for first, param, code in (
            ({**CREATE, "voice": "nobody"}, "voice", "voice_not_found"),
            ({**CREATE, "model": "other"}, "model", "model_not_found"),
            ({**CREATE, "speed": 9}, "speed", "less_than_equal"),
            ({**CREATE, "instructions": "..."}, "instructions", "invalid_value"),
            ({"type": "input_text.append", "text": "x"}, "model", "missing"),
            ([], None, None),
            ("no JSON", None, None),
        ):
            error, closed = refusal(server, first)
            assert closed == 1008
            assert param is None or (error["param"], error["code"]) == (param, code)
        assert not speaker.requests
        error, closed = refusal(server, CREATE, "x" * 21)
        assert (error["code"], closed) == ("string_above_max_length", 1008)
        error, closed = refusal(server, CREATE, {"type": "input_text.send", "text": "x"})
        assert closed == 1008


def test_later_messages_are_checked_too():
    def waits(speech):
        speech.put(tone(0.5))
        until_cancelled(speech)

    with scripted(waits, max_characters=20) as (server, speaker):
        for message in ("x" * 21, {"type": "nothing"}, CREATE):
            with Client(server) as client:
                client.send(CREATE, "Hello.")
                assert client.message()["type"] == "speech.created"
                client.send(message)
                _, messages, code = client.rest()
                assert messages[-1]["type"] == "speech.audio.error"
                assert code == 1008
            wait_for(lambda: speaker.speeches[-1].cancelled)
            assert next(speaker.requests[-1].text) == "Hello."
        with Client(server) as client:
            client.send(CREATE, "Hello.")
            client.done()
            client.done()
            assert client.rest()[2] == 1008
        with Client(server) as client:  # larger than any message may be
            client.send(CREATE, "x" * (1 << 20))
            assert client.rest()[2] == 1009


def test_a_failure_is_told_and_closes():
    def fails(speech):
        speech.put(tone(0.5))
        raise BusyError("no room", retry_after=1.0)

    with scripted(fails) as (server, speaker):
        with Client(server) as client:
            client.send(CREATE, "Hello.")
            audio, messages, code = client.rest()
            assert len(audio) == RATE
            assert messages[-1]["error"]["code"] == "rate_limit_exceeded"
            assert code == 1013
        speaker.longest = 0
        error, closed = refusal(server, CREATE, "Hello.")
        assert (error["type"], closed) == ("rate_limit_error", 1013)
        server.service.phase = "draining"
        error, closed = refusal(server, CREATE, "Hello.")
        assert (error["code"], closed) == ("unavailable", 1013)
        server.service.phase = "ready"


def test_whoever_leaves_is_not_spoken_to():
    with scripted(until_cancelled) as (server, speaker):
        client = Client(server)
        client.send(CREATE, "Hello.")
        wait_for(lambda: speaker.speeches)
        client.__exit__(None, None, None)
        wait_for(lambda: speaker.speeches[0].released.is_set())
        wait_for(lambda: not server.service.responses)
        assert server.metric('cosyq_requests_total{outcome="cancelled"}') == 1
        assert list(speaker.requests[0].text) == ["Hello."]  # and nobody waits for more text


def test_keys_and_origins():
    with scripted(reads, keys=("one",), key_concurrency=1) as (server, _):

        def status(**headers):
            with pytest.raises(InvalidStatus) as refused:
                Client(server, additional_headers=headers)
            assert "error" in json.loads(refused.value.response.body)
            return refused.value.response.status_code

        assert status() == 401
        assert status(Authorization="Bearer other") == 401
        key = {"Authorization": "Bearer one"}
        assert status(**key, Origin="https://elsewhere.example") == 403
        with Client(server, additional_headers={**key, "x-request-id": "mine"}) as client:
            assert client.socket.response.headers["x-request-id"] == "mine"
            assert status(**key) == 429
        wait_for(lambda: not server.service.responses)
        with Client(server, additional_headers=key) as client:
            client.send(CREATE, "Hello.")
            client.done()
            assert client.rest()[2] == 1000


def test_it_takes_no_longer_than_any_request():
    with scripted(reads, deadline_seconds=0.3) as (server, _), Client(server) as client:
        started = time.monotonic()
        client.send(CREATE)
        _, messages, code = client.rest()
        assert (messages[-1]["error"]["code"], code) == ("deadline_exceeded", 1011)
        assert time.monotonic() - started < 3


def test_what_is_heard_is_what_the_library_says(artifact_of):
    """Of the real engine, two at once, letter by letter."""
    tts = cosyq.load(artifact_of("int8"), device="cpu")
    text = "hello world.\n\nthe fox"
    heard = {}

    def talk(seed):
        with Client(server) as client:
            client.send({**CREATE, "voice": "neutral", "seed": seed})
            for letter in text:
                client.send(letter)
                time.sleep(0.005)
            client.done()
            heard[seed] = client.rest()

    with running(lambda on_fatal: BatchSpeaker(lambda: tts, rows=2, longest_queue=2, on_fatal=on_fatal)) as server:
        threads = [threading.Thread(target=talk, args=(seed,)) for seed in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for seed in (1, 2):
        expected = np.concatenate([a.samples for a in tts.stream_text([text], voice="neutral", seed=seed)])
        audio, messages, code = heard[seed]
        assert audio == to_s16(expected)
        assert code == 1000
        assert messages[-1]["usage"]["input_tokens"] > 0


def test_it_is_there_for_scripted_speakers_only_once_they_are_loaded():
    with running(lambda _: time.sleep(1.5) or Scripted(reads), wait=False) as server:
        wait_for(lambda: server.request("GET", "/livez").status == 200)
        error, closed = refusal(server, CREATE)
        assert (error["code"], closed) == ("unavailable", 1013)
