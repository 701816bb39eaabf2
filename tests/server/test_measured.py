"""Requests over HTTP beside the engine's own: what a client's times are of, and how the server comes and goes."""

import os
import stat
import sys
import time

import pytest
import torch
from serving import scripted, tone

from cosyq.artifact.reader import open_artifact
from cosyq.bench import serve
from cosyq.bench.serve import hear, link_with_voice, over_http, serving
from cosyq.bench.streams import Load, concurrent
from cosyq.errors import CosyqError, DeviceError
from cosyq.random_model import random_voice
from cosyq.runtime.request import Requests
from cosyq.runtime.synthesizer import load

CPU = torch.device("cpu")
PCM = {"model": "tts-1", "voice": "default", "input": "Hello there.", "response_format": "pcm"}


def test_a_server_of_the_same_voice_does_the_same_work(artifact_of, monkeypatch, tmp_path):
    """Of an artifact without voices, whatever the variables of a server at home say."""
    for module in ("streams", "serve"):
        monkeypatch.setattr(f"cosyq.bench.{module}.WORDS", "yes")
    for variable in ("COSYQ_API_KEY", "COSYQ_MAX_CHARACTERS"):
        monkeypatch.setenv(variable, "1")
    artifact, said = open_artifact(artifact_of("int8")), []
    manner = Requests(artifact).manner({"voice": random_voice(0), "seed": 0})
    before, asked = sorted(artifact.folder.rglob("*")), Load((1, 5), 1, 2)
    own = concurrent(load(artifact, device="cpu", dtype="fp32"), manner, asked, lambda _: None)
    place = {"engine": "cpu", "device": "cpu", "dtype": "fp32"}
    found = over_http(artifact, manner, place, asked, own.streams[0].rows, CPU, said.append)

    audio = [heard.audio for heard in own.alone]
    assert len(set(audio)) > 1  # so that the next line says something
    assert [heard.audio for heard in found.alone] == audio
    assert all(0 < heard.first < heard.whole for heard in found.alone)
    assert [(s.streams, s.rows, s.requests) for s in found.streams] == [(1, 4, 1), (5, 4, 5)]
    assert said == [
        "starting a server",
        *(f"over HTTP, {what}" for what in ("1 at once", "5 at once", "one after another")),
    ]
    assert sorted(artifact.folder.rglob("*")) == before


def test_a_voice_lies_beside_the_links_and_not_behind_them(mini_artifact, tmp_path):
    artifact = open_artifact(mini_artifact)
    before = {path: path.stat().st_mtime_ns for path in mini_artifact.rglob("*")}
    voice = random_voice(0)
    name = link_with_voice(artifact, voice, tmp_path / "linked")
    linked = open_artifact(tmp_path / "linked")
    assert linked.voice_files().keys() == {*artifact.voice_files(), name}
    assert linked.voice_files()[name].read_bytes() == voice.to_bytes()
    assert {path: path.stat().st_mtime_ns for path in mini_artifact.rglob("*")} == before


# ---- a client's times


def test_first_audio_is_the_first_byte_and_the_whole_the_last():
    def script(speech):
        for _ in range(2):
            time.sleep(0.3)
            speech.put(tone(0.7))

    with scripted(script) as (server, speaker):
        found = hear(server.port, PCM | {"seed": 5}, 24_000)
    assert found.audio == 1.4
    assert 0.3 < found.first < 0.6 < found.whole
    assert [request.seed for request in speaker.requests] == [5]


def test_what_is_no_audio_to_the_end_is_no_figure():
    def script(speech):
        speech.put(tone(0.5))
        time.sleep(0.2)
        raise CosyqError("the device is gone")

    with scripted(script) as (server, _):
        with pytest.raises(CosyqError, match="the server broke off"):
            hear(server.port, PCM, 24_000)
        with pytest.raises(CosyqError, match=r"answered 400 .*there is no voice 'nobody'"):
            hear(server.port, PCM | {"voice": "nobody"}, 24_000)
    with pytest.raises(CosyqError, match="the server broke off"):
        hear(server.port, PCM, 24_000)


# ---- the server

STAND_IN = """
import http.server, json, os, sys

class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_GET(self):
        Handler.asked += 1
        self.send_response(200 if self.path == "/readyz" and Handler.asked > NEVER else 503)
        self.end_headers()
    def log_message(self, *_):
        pass

server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
open(PIDS, "w").write(str(os.getpid()))
print("{not yet\\n" + json.dumps({"message": "listening", "port": server.server_port}), file=sys.stderr, flush=True)
server.serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """What runs instead of `cosyq serve`; the pid of what has run."""

    def put(code=STAND_IN, never=3):
        script, program = tmp_path / "server.py", tmp_path / "python"
        script.write_text(code.replace("NEVER", str(never)).replace("PIDS", repr(str(tmp_path / "pid"))))
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(serve.sys, "executable", str(program))
        return lambda: int((tmp_path / "pid").read_text())

    return put


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_server_is_waited_for_and_ends_with_the_block(stand_in, tmp_path):
    pid = stand_in()
    with serving([], tmp_path / "log") as port:
        assert serve._is_ready(port)
        assert not gone(pid())
    assert gone(pid())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_it_ends_with_whoever_measures(stand_in, tmp_path, error):
    pid = stand_in()
    with pytest.raises(error), serving([], tmp_path / "log"):
        raise error
    assert gone(pid())


def test_a_request_that_fails_is_told_with_what_the_server_said(stand_in, tmp_path):
    pid = stand_in()
    with pytest.raises(CosyqError, match=r"^a request broke off; it said: \{not yet"), serving([], tmp_path / "log"):
        raise CosyqError("a request broke off")
    assert gone(pid())


def test_one_that_is_never_ready_is_given_up(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "START_SECONDS", 0.5)
    pid = stand_in(never=1000)
    with (
        pytest.raises(CosyqError, match=r"not ready in 0.5 seconds; it said: .*listening"),
        serving([], tmp_path / "log"),
    ):
        pass
    assert gone(pid())


@pytest.mark.parametrize(("code", "kind"), [(3, CosyqError), (4, DeviceError)])
def test_one_that_cannot_start_says_why(stand_in, tmp_path, code, kind):
    stand_in(f"import sys; print('error: no luck', file=sys.stderr); sys.exit({code})")
    with pytest.raises(CosyqError, match=r"it said: error: no luck$") as raised, serving([], tmp_path / "log"):
        pass
    assert type(raised.value) is kind
