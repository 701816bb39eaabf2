"""POST /v1/audio/speech on a speaker that does as told: fields, formats, streams, errors, and who leaves early."""

import base64
import http.client
import json
import random
import socket
import threading
import time

import numpy as np
import openai
import pytest
from serving import (
    BODY,
    RATE,
    Scripted,
    decoded,
    events_of,
    running,
    says,
    scripted,
    seconds_of,
    tone,
    until_cancelled,
    wait_for,
)

from cosyq.errors import CosyqError, DeviceError, UsageError
from cosyq.server import delivery
from cosyq.server.encoders import WIRES
from cosyq.server.failures import Failure
from cosyq.server.schemas import VOICE_ALIASES
from cosyq.server.speaker import Chunk

FORMATS = list(WIRES)
OPENAI_VOICES = [
    "alloy",
    "ash",
    "ballad",
    "coral",
    "echo",
    "fable",
    "onyx",
    "nova",
    "sage",
    "shimmer",
    "verse",
    "marin",
    "cedar",
]


@pytest.fixture(scope="module")
def two():
    """A server whose speaker says two seconds in four chunks."""
    with scripted(says(*[tone(0.5)] * 4), longest_queue=1000) as (server, speaker):
        yield server, speaker


@pytest.mark.parametrize(("format", "in_a_thread"), [("pcm", False), ("wav", False), ("mp3", True)])
def test_what_takes_no_time_is_encoded_where_it_is(two, monkeypatch, format, in_a_thread):
    """Another thread would have to get Python's lock from the one that computes, twice."""
    encoded = []
    to_thread = delivery.asyncio.to_thread

    async def noted(work, *arguments):
        encoded.append(work)
        return await to_thread(work, *arguments)

    monkeypatch.setattr(delivery.asyncio, "to_thread", noted)
    server, _ = two
    assert server.request("POST", "/v1/audio/speech", {**BODY, "response_format": format}).status == 200
    assert bool(encoded) is in_a_thread


# ---- what is sent


@pytest.mark.parametrize("speed", [0.25, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_at_every_speed_raw_and_as_events(two, format, speed):
    """The engine is asked for its part of the speed, and what it cannot is stretched behind it."""
    server, speaker = two
    raw = server.speak(response_format=format, speed=speed)
    assert raw.status == 200
    assert raw.headers["content-type"] == WIRES[format].media_type
    assert raw.headers["transfer-encoding"] == "chunked"
    engine = speaker.requests[-1].speed
    assert engine == min(max(speed, 0.5), 2.0)
    assert seconds_of(raw.body, format) == pytest.approx(2.0 * engine / speed, abs=0.05)
    *deltas, done, end = events_of(server.speak(response_format=format, speed=speed, stream_format="sse").body)
    assert {event["type"] for event in deltas} == {"speech.audio.delta"}
    joined = b"".join(base64.b64decode(event["audio"]) for event in deltas)
    np.testing.assert_array_equal(decoded(joined, format)[0], decoded(raw.body, format)[0])
    assert done == {
        "type": "speech.audio.done",
        "usage": {"input_tokens": 3, "output_tokens": 25, "total_tokens": 28},
    }
    assert end == "[DONE]"


@pytest.mark.parametrize("speed", [1.0, 4.0])
def test_events_say_when_each_utterance_is_heard(speed):
    """In seconds of the audio that is sent, without the silence after a paragraph."""
    sound = tone(0.5).samples
    chunks = [
        Chunk(sound, 1, 5, "", 0, "One."),
        Chunk(sound, 1, 9, "stop", 0, "One. And more."),
        Chunk(np.zeros(RATE // 10, np.float32), 1, 9, "", 0, "One. And more.", RATE // 10),
        Chunk(sound, 1, 12, "stop", 1, "Two."),
    ]
    with scripted(says(*chunks)) as (server, _):
        ask = {"stream_format": "sse", "response_format": "pcm", "speed": speed}
        done = events_of(server.speak(**ask, timestamps=True).body)[-2]
        stretch = max(speed / 2, 1.0)
        assert [segment["text"] for segment in done["segments"]] == ["One. And more.", "Two."]
        times = [time for segment in done["segments"] for time in (segment["start"], segment["end"])]
        assert times == pytest.approx([t / stretch for t in (0.0, 1.0, 1.1, 1.6)], abs=1e-3)
        assert "segments" not in events_of(server.speak(**ask).body)[-2]


@pytest.mark.parametrize("events", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_audio_is_sent_while_the_rest_is_made(format, events):
    heard = threading.Event()

    def script(speech):
        for _ in range(4):
            speech.put(tone(0.5))
        assert heard.wait(20), "the client got nothing before the end"
        speech.put(tone(0.5))

    with scripted(script) as (server, _):
        stream_format = "sse" if events else "audio"
        body = BODY | {"response_format": format, "stream_format": stream_format, "speed": 4.0}
        response = server.open("POST", "/v1/audio/speech", body).getresponse()
        early = response.read1(64)
        assert early
        while len(early) < 1000:
            early += response.read1(1000)
        heard.set()
        assert response.read()


def test_the_fields_reach_the_speaker(two):
    server, speaker = two
    answer = server.speak(
        voice={"id": "iris"}, seed=7, instructions="speak slowly", language="fr-CA", unheard_of=[1], speed=None
    )
    assert answer.status == 200
    request = speaker.requests[-1]
    assert (request.voice, request.seed, request.instruct, request.speed) == ("iris", 7, "speak slowly", 1.0)
    assert not request.normalize, "French numbers are not read as English ones"
    assert answer.headers["x-seed"] == "7"
    drawn = server.speak(language="en", instructions=None).headers["x-seed"]
    assert speaker.requests[-1].seed == int(drawn)
    assert speaker.requests[-1].normalize
    assert speaker.requests[-1].instruct is None
    server.speak(normalize=False)
    assert not speaker.requests[-1].normalize


def test_openais_names_are_understood(two):
    server, speaker = two
    assert sorted(VOICE_ALIASES) == sorted(OPENAI_VOICES)
    found = set()
    for voice in OPENAI_VOICES:
        assert server.speak(voice=voice, response_format="pcm").status == 200
        found.add(speaker.requests[-1].voice)
    assert found == {"default", "iris", "magnus"}, "they are spread over the voices there are"
    assert server.speak(voice="alloy").status == 200
    assert speaker.requests[-1].voice == "default"
    for model in ("tts-1", "tts-1-hd", "gpt-4o-mini-tts", "scripted"):
        assert server.speak(model=model).status == 200


def test_what_there_is_can_be_listed(two):
    server, _ = two
    names = ["scripted", "tts-1", "tts-1-hd", "gpt-4o-mini-tts"]
    assert [model.id for model in server.openai.models.list()] == names
    assert server.openai.models.retrieve("tts-1").id == "tts-1"
    assert server.request("GET", "/v1/models/other").error["code"] == "model_not_found"
    assert [m["id"] for m in server.request("GET", "/v1/audio/models").json["models"]] == names
    voices = server.request("GET", "/v1/audio/voices").json
    assert voices["voices"] == [{"id": name, "name": name} for name in ("default", "iris", "magnus")]
    assert set(voices["aliases"]) == set(OPENAI_VOICES)


# ---- what is refused

REFUSED = [
    ({"model": "tts-9"}, 404, "model", "model_not_found"),
    ({"model": None}, 400, "model", "missing"),
    ({"voice": "nobody"}, 400, "voice", "voice_not_found"),
    ({"voice": {"id": "nobody"}}, 400, "voice", "voice_not_found"),
    ({"voice": {"name": "iris"}}, 400, "voice", None),
    ({"voice": "../../etc/passwd"}, 400, "voice", "voice_not_found"),
    ({"voice": "\ud800"}, 400, "voice", None),
    ({"input": None}, 400, "input", "missing"),
    ({"input": ""}, 400, "input", "string_too_short"),
    ({"input": "... !"}, 400, "input", "invalid_value"),
    ({"input": "\ud800hello"}, 400, "input", None),
    ({"input": "a" * 4097}, 400, "input", "string_above_max_length"),
    ({"input": 5}, 400, "input", "string_type"),
    ({"response_format": "ogg"}, 400, "response_format", "literal_error"),
    ({"stream_format": "xml"}, 400, "stream_format", "literal_error"),
    ({"speed": 0.2}, 400, "speed", "greater_than_equal"),
    ({"speed": 4.1}, 400, "speed", "less_than_equal"),
    ({"speed": float("nan")}, 400, "speed", None),
    ({"speed": "fast"}, 400, "speed", "float_parsing"),
    ({"seed": -1}, 400, "seed", "greater_than_equal"),
    ({"seed": 2**63}, 400, "seed", "less_than_equal"),
    ({"language": "english; drop"}, 400, "language", "string_pattern_mismatch"),
    ({"instructions": "..."}, 400, "instructions", "invalid_value"),
    ({"instructions": "slowly<|endofprompt|>"}, 400, "instructions", "invalid_value"),
]


@pytest.mark.parametrize(("fields", "status", "param", "code"), REFUSED)
def test_what_cannot_be_spoken_is_refused_by_field(two, fields, status, param, code):
    server, speaker = two
    before = len(speaker.requests)
    answer = server.speak(**fields)
    assert answer.status == status
    error = answer.error
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert code in (None, error["code"])
    assert len(speaker.requests) == before


def test_a_failure_can_name_what_utf8_cannot():
    failure = Failure(400, "half a surrogate: \ud800", "invalid_request_error")
    assert json.loads(failure.body())["error"]["message"] == failure.message


BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 5000,
    b'{"seed": ' + b"9" * 5000 + b"}",
    json.dumps(BODY).encode()[:-3],
]


@pytest.mark.parametrize("body", BODIES)
def test_a_body_that_is_no_request(two, body):
    answer = two[0].request("POST", "/v1/audio/speech", body)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"


def test_a_thousand_damaged_bodies(two):
    server, _ = two
    chance, whole = (
        random.Random(0),
        json.dumps(BODY | {"response_format": "pcm", "seed": 3, "voice": {"id": "iris"}}).encode(),
    )
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    statuses = set()
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        connection.request("POST", "/v1/audio/speech", bytes(data), {"content-type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        statuses.add(response.status)
        if response.status != 200:
            assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
    assert statuses <= {200, 400, 404}
    assert 400 in statuses


def test_other_paths_and_methods_have_errors_of_the_same_shape(two):
    server, _ = two
    assert server.request("GET", "/v1/nothing").error["code"] == "not_found"
    assert server.request("GET", "/v1/audio/speech").error["code"] == "method_not_allowed"
    wrong = server.request("POST", "/v1/audio/speech", json.dumps(BODY).encode(), content_type="text/plain")
    assert wrong.status == 400
    assert wrong.error


def test_a_body_is_limited_whether_or_not_it_says_its_length(two):
    server, _ = two
    answer = server.speak(input="a" * 300_000)
    assert answer.status == 413
    assert answer.error["code"] == "body_too_large"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
        raw.sendall(b"POST /v1/audio/speech HTTP/1.1\r\nhost: x\r\ncontent-length: 2000000000\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    head = {"content-type": "application/json"}
    connection.request("POST", "/v1/audio/speech", (b" " * 10_000 for _ in range(30)), head, encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["error"]["code"] == "body_too_large"


# ---- what goes wrong

FAILURES = [
    (UsageError("no such thing", where="text"), 400, "invalid_request_error"),
    (DeviceError("out of memory"), 500, "server_error"),
    (CosyqError("internal error"), 500, "server_error"),
]


@pytest.mark.parametrize("events", ["audio", "sse"])
@pytest.mark.parametrize(("error", "status", "kind"), FAILURES)
def test_a_failure_before_the_first_audio_is_no_success(error, status, kind, events):
    def script(speech):
        raise error

    with scripted(script) as (server, _):
        answer = server.speak(stream_format=events)
        assert answer.status == status
        assert answer.error["type"] == kind
        assert server.metric('cosyq_requests_total{outcome="failed"}') == 1


@pytest.mark.parametrize("chunks", [[], [Chunk(np.zeros(0, np.float32), 3, 0, "stop")]])
def test_no_audio_is_no_success(chunks):
    with scripted(says(*chunks)) as (server, _):
        answer = server.speak()
        assert answer.status == 500
        assert "no audio" in answer.error["message"]


def fails_later(speech):
    speech.put(tone(1.0))
    time.sleep(0.2)
    raise DeviceError("out of memory")


@pytest.mark.parametrize("format", FORMATS)
def test_a_later_failure_breaks_the_stream(format):
    with scripted(fails_later) as (server, _):
        response = server.open("POST", "/v1/audio/speech", BODY | {"response_format": format}).getresponse()
        assert response.status == 200
        with pytest.raises(http.client.IncompleteRead):
            response.read()
        with pytest.raises(Exception, match="incomplete chunked read"), _streaming(server, format) as stream:
            for _ in stream.iter_bytes():  # an error of the HTTP library's own
                pass
        assert server.metric('cosyq_requests_total{outcome="failed"}') == 2


def _streaming(server, format):
    create = server.openai.audio.speech.with_streaming_response.create
    return create(model="tts-1", voice="alloy", input="Hello.", response_format=format)


def test_a_later_failure_is_told_among_events_and_breaks_their_stream():
    with scripted(fails_later) as (server, _):
        *deltas, last = server.broken_events(response_format="pcm")
        assert deltas
        assert last["type"] == "speech.audio.error"
        assert "out of memory" in last["error"]["message"]
        assert last["error"]["type"] == "server_error"


# ---- how long it takes


def test_a_full_queue_is_refused_at_once():
    with scripted(until_cancelled, longest_queue=1) as (server, speaker):
        first = server.open("POST", "/v1/audio/speech", BODY)
        wait_for(lambda: speaker.speeches)
        answer = server.speak()
        assert answer.status == 429
        assert answer.error["type"] == "rate_limit_error"
        assert answer.error["code"] == "rate_limit_exceeded"
        assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("2", "1500")
        with pytest.raises(openai.RateLimitError):
            server.openai.audio.speech.create(model="tts-1", voice="alloy", input="Hello.")
        assert server.metric('cosyq_requests_total{outcome="rejected"}') == 2
        first.close()


def test_openais_client_comes_back_when_told():
    calls = []

    class Later(Scripted):
        def submit(self, request):
            calls.append(time.monotonic())
            self.longest = 8 if len(calls) > 1 else 0
            return super().submit(request)

    with running(lambda _: Later(says(tone(1.0)))) as server:
        client = server.openai.with_options(max_retries=1)
        assert client.audio.speech.create(model="tts-1", voice="alloy", input="Hello.").content
        assert calls[1] - calls[0] >= 1.4


def test_the_queue_is_not_waited_in_for_ever():
    def never(speech):
        until_cancelled(speech)

    never.begins = False
    with scripted(never, wait_seconds=0.3) as (server, speaker):
        started = time.monotonic()
        answer = server.speak()
        assert 0.3 <= time.monotonic() - started < 2
        assert answer.status == 429
        assert answer.headers["retry-after-ms"] == "1500"
        wait_for(lambda: speaker.speeches[0].released.is_set())


def test_a_deadline_before_the_first_audio():
    with scripted(until_cancelled, deadline_seconds=0.3) as (server, speaker):
        answer = server.speak()
        assert answer.status == 504
        assert answer.error["code"] == "deadline_exceeded"
        wait_for(lambda: speaker.speeches[0].released.is_set())


def slow(speech):
    speech.put(tone(0.5))
    until_cancelled(speech)


def test_a_deadline_in_the_middle():
    with scripted(slow, deadline_seconds=0.5) as (server, speaker):
        response = server.open("POST", "/v1/audio/speech", BODY).getresponse()
        with pytest.raises(http.client.IncompleteRead):
            response.read()
        last = server.broken_events()[-1]
        assert last["error"]["code"] == "deadline_exceeded"
        wait_for(lambda: all(speech.released.is_set() for speech in speaker.speeches))


def test_who_does_not_read_is_cut_at_the_deadline():
    """The audio outgrows every buffer between; nothing may wait for the reader longer than the deadline."""
    with scripted(says(*[tone(60.0)] * 10), deadline_seconds=1.0) as (server, speaker):
        connection = server.open("POST", "/v1/audio/speech", BODY | {"response_format": "pcm"})
        wait_for(lambda: speaker.speeches)
        wait_for(lambda: server.service.responses == 0, seconds=6)
        assert speaker.speeches[0].cancelled
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            connection.getresponse().read()


def test_small_answers_do_not_wait_for_acknowledgements(two):
    """Nagle's algorithm and delayed acknowledgements would make 40 ms of each."""
    server, _ = two
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    times = []
    for _ in range(21):
        started = time.monotonic()
        connection.request("GET", "/livez")
        connection.getresponse().read()
        times.append(time.monotonic() - started)
    assert sorted(times)[10] < 0.02


# ---- who leaves


@pytest.mark.parametrize("events", ["audio", "sse"])
@pytest.mark.parametrize("moment", ["queued", "begun", "streaming"])
def test_a_client_that_leaves_frees_its_work_within_100_ms(moment, events):
    def script(speech):
        if moment == "streaming":
            speech.put(tone(1.0))
        until_cancelled(speech)

    script.begins = moment != "queued"
    with scripted(script) as (server, speaker):
        connection = server.open("POST", "/v1/audio/speech", BODY | {"stream_format": events})
        (speech,) = wait_for(lambda: speaker.speeches)
        if moment == "streaming":
            assert connection.getresponse().read1(10)
        elif moment == "begun":
            wait_for(lambda: speech.started.is_set())
        left = time.monotonic()
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        wait_for(lambda: speech.released.is_set())
        assert speech.cancelled_at - left < 0.1
        assert speech.released_at - left < 0.1
        wait_for(lambda: server.metric('cosyq_requests_total{outcome="cancelled"}') == 1)
        if moment != "queued":
            assert server.metric("cosyq_cancel_seconds_count") == 1
            assert server.metric('cosyq_cancel_seconds_bucket{le="0.1"}') == 1


def test_what_was_spoken_whole_counts_as_such(two, monkeypatch):
    server, speaker = two
    monkeypatch.setattr(speaker, "linger", 0.1)
    before = server.metric('cosyq_requests_total{outcome="ok"}'), server.metric("cosyq_audio_seconds_total")
    cancels = server.metric("cosyq_cancel_seconds_count")
    server.speak()
    wait_for(lambda: server.metric('cosyq_requests_total{outcome="ok"}') == before[0] + 1)
    assert server.metric("cosyq_audio_seconds_total") == pytest.approx(before[1] + 2.0)
    wait_for(lambda: speaker.speeches[-1].released.is_set())
    assert server.metric("cosyq_cancel_seconds_count") == cancels
    assert server.metric("cosyq_first_audio_seconds_count") >= before[0] + 1
    assert server.metric("cosyq_queue_depth") == 2
    assert server.service.speaker.sample_rate == RATE
