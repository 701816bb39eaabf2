"""The application on a local Ray, on the CPU with cosyq-mini, through Ray's own proxy.

Skipped where Ray is missing; to run them: pip install 'cosyq[ray]', 370 MB.
"""

import http.client
import inspect
import json
import logging
import os
import shutil
import socket
import threading
import time
from contextlib import contextmanager

import numpy as np
import openai
import pytest
from serving import BODY, Endpoint, decoded, events_of, metric_of, wait_for
from websockets.sync.client import connect

import cosyq
from cosyq.artifact.edit import put_voice
from cosyq.artifact.reader import open_artifact
from cosyq.audio.sinks import to_s16
from cosyq.cli.serve import serve as command

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")
from cosyq.server.ray import Options, app  # noqa: E402  it imports Ray

TEXT = "Hello there."
LONG = "My grandmother used to bake bread every Saturday. Thank you very much. " * 4


@pytest.fixture(scope="module")
def cluster():
    """Ray with a proxy; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("COSYQ_")]:
            patch.delenv(name)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield port
        finally:
            serve.shutdown()
            ray.shutdown()


def options(artifact, **more):
    return Options(artifact=artifact, device="cpu", **more)


@contextmanager
def deployed(told, cluster, name, prefix):
    serve.run(app(told), name=name, route_prefix=prefix, logging_config={"log_level": "ERROR"})
    try:
        yield Endpoint(cluster)
    finally:
        serve.delete(name)


@pytest.fixture(scope="module")
def artifact(mini_artifact, tmp_path_factory):
    """A copy, to which a voice is added."""
    return shutil.copytree(mini_artifact, tmp_path_factory.mktemp("shared") / "mini")


@pytest.fixture(scope="module")
def server(artifact, cluster):
    """Two replicas."""
    told = options(artifact, min_replicas=2, max_replicas=2, max_concurrency=2, queue=2, deadline=30)
    with deployed(told, cluster, "main", "/") as made:
        yield made


def replicas(server, count=2):
    """The metrics of each replica, asked until as many have answered; each was made at a time of its own."""
    found = {}

    def all_of_them():
        text = server.get("/metrics")[1]
        found[metric_of(text, "cosyq_audio_seconds_created")] = text
        return len(found) >= count

    wait_for(all_of_them)
    return list(found.values())


def total(server, name):
    return sum(metric_of(text, name) for text in replicas(server))


def ask(**more):
    return {
        "model": "tts-1",
        "voice": "alloy",
        "input": TEXT,
        "response_format": "pcm",
        "extra_body": {"seed": 7},
    } | more


def actors():
    found = ray.util.list_named_actors(all_namespaces=True)
    return [a for a in found if a["name"].startswith("SERVE_REPLICA::main")]


# ---- what it is told


def test_it_is_told_what_the_command_is(monkeypatch):
    """The same names, defaults and variables, but for what a replica has no use for."""
    parameters = inspect.signature(command).parameters
    flags = {name: p.default for name, p in parameters.items() if name not in ("context", "host", "port", "source")}
    own = {"min_replicas", "max_replicas"}
    assert Options.model_fields.keys() - own == flags.keys()
    for name, default in flags.items():
        if name not in ("artifact", "api_key"):
            assert Options.model_fields[name].default == default, name
    monkeypatch.setenv("COSYQ_QUEUE", "7")
    monkeypatch.setenv("COSYQ_API_KEY", "one two")
    told = Options(artifact="x", wait="3")
    assert (told.queue, told.wait) == (7, 3.0)
    assert told.settings().keys == ("one", "two")
    assert Options(artifact="x", queue=8).queue == 8
    for wrong in ({"queue": 0}, {"quue": 1}, {"engine": "warp"}):
        with pytest.raises(ValueError, match="1 validation error"):
            Options(artifact="x", **wrong)


def test_each_replica_takes_a_gpu_unless_it_is_to_do_without():
    def asked(**more):
        return app(Options(artifact="x", **more))._bound_deployment.ray_actor_options["num_gpus"]

    assert (asked(), asked(device="cuda"), asked(device="cpu")) == (1, 1, 0)


# ---- what comes through


def test_the_samples_are_the_librarys(server, mini_artifact):
    data = server.client().audio.speech.create(**ask()).content
    tts = cosyq.load(mini_artifact, device="cpu")
    assert data == to_s16(np.concatenate([a.samples for a in tts.stream(TEXT, voice="default", seed=7)]))


def test_it_comes_as_it_is_made(server):
    with server.client().audio.speech.with_streaming_response.create(**ask(input=LONG)) as response:
        started = time.monotonic()
        arrived = [(time.monotonic() - started, len(data)) for data in response.iter_bytes()]
        assert response.headers.get("x-request-id").count(",") == 0
    assert sum(size for _, size in arrived) > 6 * 48_000
    assert arrived[0][0] < 0.4 * arrived[-1][0]


def test_events_come_whole(server):
    response = server.open(BODY | {"stream_format": "sse", "response_format": "pcm", "seed": 7}).getresponse()
    *deltas, done, end = events_of(response.read())
    assert {event["type"] for event in deltas} == {"speech.audio.delta"}
    assert done["type"] == "speech.audio.done"
    assert end == "[DONE]"


def test_a_conversation_comes_through(server):
    with connect(f"ws://127.0.0.1:{server.port}/v1/audio/speech") as socket:
        socket.send(json.dumps({"type": "speech.create", "model": "tts-1", "voice": "alloy"}))
        for piece in ("It speaks ", "as the wor", "ds come."):
            socket.send(json.dumps({"type": "input_text.append", "text": piece}))
        socket.send(json.dumps({"type": "input_text.done"}))
        messages = list(socket)
    assert len(b"".join(m for m in messages if isinstance(m, bytes))) > 48_000
    assert json.loads(messages[-1])["type"] == "speech.audio.done"


def test_errors_are_openais(server):
    with pytest.raises(openai.BadRequestError) as refusal:
        server.client().audio.speech.create(**ask(voice="nobody"))
    assert (refusal.value.param, refusal.value.code) == ("voice", "voice_not_found")
    with pytest.raises(openai.NotFoundError):
        server.client().audio.speech.create(**ask(model="tts-9"))


def test_voices_are_fixed(server):
    """One replica would know of a change, and the next one write over it."""
    with pytest.raises(openai.PermissionDeniedError) as refusal:
        server.client().delete("/audio/voices/pip", cast_to=object)
    assert refusal.value.code == "voices_fixed"
    files = {"name": (None, "me"), "consent": (None, "true"), "audio_sample": ("a.wav", b"RIFF", "audio/wav")}
    with pytest.raises(openai.PermissionDeniedError):
        server.client().post(
            "/audio/voices", cast_to=object, files=files, options={"headers": {"content-type": "multipart/form-data"}}
        )


def test_a_voice_that_is_put_into_the_folder_is_every_replicas(server, artifact):
    opened = open_artifact(artifact)
    put_voice(opened, "pat", opened.voice_files()["pip"].read_bytes())
    heard = [server.client().audio.speech.create(**ask(voice=voice)).content for voice in ["pip", *["pat"] * 6]]
    assert set(heard) == {heard[0]}


def test_a_client_that_leaves_frees_its_replica(server):
    before = total(server, 'cosyq_requests_total{outcome="cancelled"}')
    response = (connection := server.open(BODY | {"input": LONG})).getresponse()
    assert response.read1(100)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    wait_for(lambda: total(server, 'cosyq_requests_total{outcome="cancelled"}') == before + 1)
    wait_for(lambda: total(server, "cosyq_active_requests") == 0)


def test_replicas_share_and_refuse_what_is_too_much(server):
    """Two are spoken and two wait in each: of sixteen at once, eight are held at most, and all that are, are whole."""

    def hear():
        response = server.open(BODY | {"input": TEXT * 3, "response_format": "wav", "seed": 7}).getresponse()
        heard.append((response.status, response.getheader("retry-after"), response.read()))

    heard = []
    before = [metric_of(text, "cosyq_audio_seconds_total") for text in replicas(server)]
    threads = [threading.Thread(target=hear) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    whole = [data for status, _, data in heard if status == 200]
    refused = [(after, json.loads(data)["error"]["type"]) for status, after, data in heard if status == 429]
    assert len(whole) + len(refused) == 16
    assert 4 <= len(whole) <= 8
    assert len(set(whole)) == 1
    assert {kind for _, kind in refused} == {"rate_limit_error"}
    assert all(int(after) >= 1 for after, _ in refused)
    after = [metric_of(text, "cosyq_audio_seconds_total") for text in replicas(server)]
    assert sum(now > was for was, now in zip(sorted(before), sorted(after), strict=True)) == 2


def test_what_is_cut_breaks_off(server):
    """At its deadline, thirty seconds; nothing may look as if it were whole."""
    response = server.open(BODY | {"input": LONG * 10, "response_format": "pcm"}).getresponse()
    assert response.status == 200
    with pytest.raises(http.client.IncompleteRead):
        response.read()


def test_a_replica_that_dies_breaks_its_streams_and_is_replaced(server):
    response = server.open(BODY | {"input": LONG * 2, "response_format": "pcm"}).getresponse()
    assert response.read1(100)
    before = {actor["name"] for actor in actors()}
    for actor in actors():
        ray.kill(ray.get_actor(**actor))
    with pytest.raises(http.client.IncompleteRead):
        response.read()
    wait_for(lambda: len({actor["name"] for actor in actors()} - before) == 2, 60)
    client = server.client().with_options(max_retries=5)
    assert len(decoded(client.audio.speech.create(**ask()).content, "pcm")[0]) > 12_000


# ---- its life, in deployments of their own


def test_more_requests_bring_another_replica_and_a_stop_lets_them_finish(mini_artifact, cluster):
    """Under a path of its own, where the same requests need the same key."""

    def get(path, key=None, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", cluster, timeout=60)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        data = json.dumps(body) if body else None
        connection.request(
            "POST" if body else "GET", f"/other{path}", data, {"content-type": "application/json", **headers}
        )
        return connection.getresponse()

    def running():
        return serve.status().applications["other"].deployments["cosyq"].replica_states.get("RUNNING", 0)

    told = options(mini_artifact, api_key="sesame", max_replicas=2, max_concurrency=1, wait=120, drain=60)
    body = BODY | {"input": TEXT * 3, "response_format": "wav", "seed": 7}
    with deployed(told, cluster, "other", "/other"):
        assert get("/readyz").read() == b'{"status": "ready"}'
        for key in (None, "barley"):
            assert get("/v1/audio/speech", key, body).status == 401
        stop, heard = threading.Event(), []

        def listen():
            while not stop.is_set():
                heard.append(get("/v1/audio/speech", "sesame", body).read())

        threads = [threading.Thread(target=listen) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert running() == 1
        wait_for(lambda: running() == 2, 120)
        # Each is in the middle of something now.
        stop.set()
    for thread in threads:
        thread.join(60)
    assert len(heard) > 3
    assert len(set(heard)) == 1


def test_what_cannot_be_loaded_is_told(tmp_path, cluster):
    with pytest.raises(RuntimeError):
        serve.run(
            app(options(tmp_path / "nothing")), name="none", route_prefix="/none", logging_config={"log_level": "ERROR"}
        )
    assert "no such artifact" in serve.status().applications["none"].deployments["cosyq"].message
    serve.delete("none")
