"""Who may ask, how the server is, and how it ends."""

import asyncio
import http.client
import json
import logging
import re
import sys
import threading
import time

import pytest
from serving import BODY, Scripted, decoded, running, says, scripted, tone, until_cancelled, wait_for

from cosyq.errors import ArtifactError, DeviceError
from cosyq.server.app import make_app
from cosyq.server.logs import JsonFormatter
from cosyq.server.run import LAST_SECONDS, SWITCH, serve
from cosyq.server.service import Service
from cosyq.server.settings import Settings

KEYS = ("first-key", "schlüssel")


def bearer(key):
    return {"authorization": f"Bearer {key}"}


# ---- keys


def test_every_key_opens_and_nothing_else_does():
    with scripted(says(tone(0.5)), keys=KEYS) as (server, speaker):
        for key in ("first-key", "schlüssel".encode().decode("latin-1")):
            assert server.request("POST", "/v1/audio/speech", BODY, **bearer(key)).status == 200
        for headers in ({}, bearer("other"), bearer(""), bearer("first-key2"), {"authorization": "Basic first-key"}):
            answer = server.request("POST", "/v1/audio/speech", BODY, **headers)
            assert answer.status == 401
            assert answer.error["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert len(speaker.requests) == 2
        assert server.request("GET", "/v1/models/tts-1").status == 401
        assert server.request("GET", "/v1/nothing").status == 401
        for path in ("/v1/models", "/v1/audio/models", "/v1/audio/voices", "/livez", "/readyz", "/health", "/metrics"):
            assert server.request("GET", path).status == 200


def test_a_key_is_asked_for_wherever_the_application_is_mounted():
    """A proxy that serves it below a path leaves that in, and the routes are found without it."""
    app = make_app(Service(Settings(keys=KEYS)), lambda _: None)

    async def ask(path, root):
        sent = []
        scope = {"type": "http", "method": "POST", "path": path, "root_path": root, "headers": [], "query_string": b""}

        async def receive():
            return {"type": "http.request", "body": b"{}"}

        async def send(message):
            sent.append(message)

        await app(scope, receive, send)
        return sent[0]["status"]

    assert asyncio.run(ask("/v1/audio/speech", "")) == 401
    assert asyncio.run(ask("/tts/v1/audio/speech", "/tts")) == 401
    assert asyncio.run(ask("/v1/audio/speech", "/v")) == 401
    assert asyncio.run(ask("/v1/audio/speech", "/v1")) == 404  # what is left of it is /audio/speech


def test_lists_can_be_kept_private():
    with scripted(says(tone(0.5)), keys=KEYS, public_lists=False) as (server, _):
        for path in ("/v1/models", "/v1/audio/models", "/v1/audio/voices"):
            assert server.request("GET", path).status == 401
            assert server.request("GET", path, **bearer("first-key")).status == 200


def test_a_key_has_so_many_requests_at_once():
    go = threading.Event()

    def script(speech):
        speech.put(tone(0.5))
        assert go.wait(20)

    with scripted(script, keys=KEYS, key_concurrency=2) as (server, speaker):
        first = bearer("first-key")
        held = [server.open("POST", "/v1/audio/speech", BODY, **first).getresponse() for _ in range(2)]
        answer = server.request("POST", "/v1/audio/speech", BODY, **first)
        assert (answer.status, answer.error["code"]) == (429, "rate_limit_exceeded")
        assert answer.headers["retry-after"] == "1"
        assert len(speaker.requests) == 2
        assert server.request("GET", "/v1/models/tts-1", **first).status == 200  # it is about speech
        other = server.open("POST", "/v1/audio/speech", BODY, **bearer("schlüssel".encode().decode("latin-1")))
        held.append(other.getresponse())
        assert [response.status for response in held] == [200, 200, 200]
        for _ in range(3):  # and those without a key count for nobody
            assert server.speak().status == 401
        go.set()
        for response in held:
            response.read()
        wait_for(lambda: server.request("POST", "/v1/audio/speech", BODY, **first).status == 200)


# ---- what is said of it


def test_a_request_has_an_id():
    with scripted(says(tone(0.5))) as (server, _):
        assert server.request("GET", "/livez", x_request_id="my-id.1").headers["x-request-id"] == "my-id.1"
        forged = server.request("GET", "/livez", x_request_id="a b\tc").headers["x-request-id"]
        assert forged != server.request("GET", "/livez").headers["x-request-id"]
        assert len(forged) == 32
        assert server.speak(voice="nobody").headers["x-request-id"]


def test_what_is_logged_is_json_without_the_text(caplog):
    secret = "My password is hunter2."
    with caplog.at_level(logging.INFO), scripted(says(tone(0.5)), keys=KEYS) as (server, _):
        for body in (BODY, BODY | {"voice": "hunter2"}, BODY | {"speed": 9}, BODY | {"instructions": "hunter2"}):
            head = bearer("first-key") | {"x-request-id": "the-id"}
            server.request("POST", "/v1/audio/speech", body | {"input": secret}, **head)
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    assert not [line for line in lines if "hunter2" in json.dumps(line) or "first-key" in json.dumps(line)]
    requests = [line for line in lines if line["message"] == "request"]
    assert [line["status"] for line in requests] == [200, 400, 400, 200]
    first = requests[0]
    assert first["request_id"] == "the-id"
    assert first["characters"] == len(secret)
    assert (first["outcome"], first["format"], first["voice"]) == ("ok", "mp3", "default")
    assert first["audio_seconds"] == 0.5
    assert 0 <= first["wait_seconds"] <= first["first_audio_seconds"] <= first["seconds"]


def test_health_names_the_quantization_of_each_stage():
    with scripted(says(tone(0.5))) as (server, _):
        health = server.request("GET", "/health").json
        assert health["status"] == "ready"
        assert health["quantization"] == {"llm": "int8", "flow": "int8", "vocoder": "fp32"}
        assert (health["waiting"], health["active"], health["memory_bytes"]) == (2, 1, 123)
        assert server.request("GET", "/metrics").headers["content-type"].startswith("text/plain")
        assert "/v1/audio/speech" in server.request("GET", "/openapi.json").json["paths"]


def test_the_page_is_ours_alone_and_asks_for_what_there_is():
    with scripted(says(tone(0.5)), keys=KEYS) as (server, _):
        page, script = server.request("GET", "/"), server.request("GET", "/page.js")
        assert page.headers["content-type"].startswith("text/html")
        assert script.headers["content-type"].startswith("text/javascript")
        for answer in (page, script):
            assert answer.status == 200
            assert "default-src 'none'; script-src 'self'" in answer.headers["content-security-policy"]
            assert not re.search(rb"https?://|innerHTML|eval\(", answer.body)
        assert re.findall(rb'src="([^"]*)"', page.body) == [b"page.js"]
        paths = server.request("GET", "/openapi.json").json["paths"]
        asked = set(re.findall(r'fetch\("([^"]*)"', script.body.decode()))
        assert {f"/{path}" for path in asked} <= paths.keys()
        assert asked == {"v1/audio/speech", "v1/audio/voices", "health"}
        fields = set(re.findall(r'name="(\w+)"', page.body.decode()))
        assert {"input", "voice", "speed", "seed", "key", "name", "audio_sample", "transcript", "consent"} <= fields


# ---- its life


def test_while_it_loads_it_lives_and_is_not_ready():
    go = threading.Event()

    def loader(_):
        assert go.wait(20)
        return Scripted(says(tone(0.5)))

    with running(loader, wait=False) as server:
        assert wait_for(lambda: server.request("GET", "/livez").status) == 200
        assert server.request("GET", "/readyz").status == 503
        assert server.request("GET", "/readyz").json == {"status": "loading"}
        assert server.request("GET", "/health").json["status"] == "loading"
        answer = server.speak()
        assert answer.status == 503
        assert answer.error["code"] == "unavailable"
        assert answer.headers["retry-after"]
        assert server.request("GET", "/v1/models").status == 503
        go.set()
        wait_for(lambda: server.request("GET", "/readyz").status == 200)
        assert server.speak().status == 200


def test_who_waits_for_the_model_is_told_what_came_of_it():
    async def loaded(loader):
        service = Service(Settings())
        service.load(loader)
        assert service.phase == "loading"
        await asyncio.wait_for(service.loaded(), 20)
        assert service.phase == "ready"
        service.died(DeviceError("the device has failed"))
        with pytest.raises(DeviceError):
            await service.loaded()

    def slow(_):
        time.sleep(0.2)
        return Scripted(says(tone(0.5)))

    def damaged(_):
        time.sleep(0.2)
        raise ArtifactError("damaged", where="llm.safetensors")

    asyncio.run(loaded(slow))
    with pytest.raises(ArtifactError):
        asyncio.run(loaded(damaged))


def test_a_model_that_cannot_be_loaded_ends_the_server():
    def loader(_):
        raise ArtifactError("damaged", where="llm.safetensors")

    with running(loader) as server:
        server.thread.join(5)
        assert not server.thread.is_alive()
        assert isinstance(server.service.error, ArtifactError)


def test_a_failed_device_fails_everything_at_once_and_ends_the_server():
    fail = []

    def loader(on_fatal):
        fail.append(on_fatal)
        return Scripted(slow)

    with running(loader) as server:
        response = server.open("POST", "/v1/audio/speech", BODY).getresponse()
        assert response.read1(10)
        failed = time.monotonic()
        fail[0](DeviceError("the device has failed"))
        with pytest.raises(http.client.IncompleteRead):
            response.read()
        assert time.monotonic() - failed < 0.5
        server.thread.join(5)
        assert not server.thread.is_alive()
        assert isinstance(server.service.error, DeviceError)


def slow(speech):
    speech.put(tone(0.5))
    until_cancelled(speech)


def test_a_stop_lets_streams_finish_and_takes_no_more():
    go = threading.Event()

    def script(speech):
        speech.put(tone(0.5))
        assert go.wait(20)
        speech.put(tone(0.5))

    with scripted(script, drain_seconds=30.0) as (server, speaker):
        response = server.open("POST", "/v1/audio/speech", BODY | {"response_format": "pcm"}).getresponse()
        early = response.read1(10)
        server.server.handle_exit(15, None)
        wait_for(lambda: server.request("GET", "/readyz").json == {"status": "draining"})
        assert server.request("GET", "/readyz").status == 503
        assert server.request("GET", "/livez").status == 200
        assert server.speak().status == 503
        assert len(speaker.requests) == 1
        time.sleep(LAST_SECONDS + 0.5)  # longer than a server that stops at once would leave it
        assert server.request("GET", "/readyz").status == 503
        go.set()
        assert len(decoded(early + response.read(), "pcm")[0]) == 24_000
        server.thread.join(5)
        assert not server.thread.is_alive()
        assert server.service.error is None


@pytest.mark.parametrize("how", ["deadline", "second signal"])
def test_a_stop_has_a_hard_deadline(how):
    with scripted(slow, drain_seconds=0.3 if how == "deadline" else 60.0) as (server, speaker):
        response = server.open("POST", "/v1/audio/speech", BODY).getresponse()
        assert response.read1(10)
        server.server.handle_exit(15, None)
        if how != "deadline":
            assert not speaker.speeches[0].cancelled
            server.server.handle_exit(15, None)
        with pytest.raises(http.client.IncompleteRead):
            response.read()
        assert speaker.speeches[0].cancelled
        server.thread.join(5)
        assert not server.thread.is_alive()


def test_a_stop_does_not_wait_for_one_that_does_not_read():
    with scripted(says(*[tone(60.0)] * 10), drain_seconds=0.3) as (server, speaker):
        connection = server.open("POST", "/v1/audio/speech", BODY | {"response_format": "pcm"})
        wait_for(lambda: speaker.speeches and speaker.speeches[0].released.is_set())
        server.server.handle_exit(15, None)
        server.thread.join(6)
        assert not server.thread.is_alive()
        connection.close()


def test_an_answer_waits_less_for_a_thread_that_computes(monkeypatch):
    seen, before = [], sys.getswitchinterval()

    class Server:
        def __init__(self, service, loader):
            pass

        def run(self, sockets):
            seen.append(sys.getswitchinterval())

    monkeypatch.setattr("cosyq.server.run.Server", Server)
    serve(Settings(), None, None)
    assert seen == [pytest.approx(SWITCH)]
    assert sys.getswitchinterval() == before
