"""A real server, in a thread with a speaker that does as a test says or as a process; and a plain client."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import openai
from waiting import wait_for

from cosyq.server.run import Server, listen
from cosyq.server.service import Loader, Service
from cosyq.server.settings import Settings
from cosyq.server.speaker import BusyError, Chunk, Speech, SpeechRequest, Stats

RATE = 24_000
BODY = {"model": "tts-1", "input": "Hello there.", "voice": "alloy"}
COSYQ = [sys.executable, "-m", "cosyq"]
Script = Callable[[Speech], None]


def tone(seconds: float, tokens: int = 25) -> Chunk:
    samples = 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * RATE)) / RATE)
    return Chunk(samples.astype(np.float32), 3, tokens)


def says(*chunks: Chunk) -> Script:
    def script(speech: Speech) -> None:
        for chunk in chunks:
            speech.put(chunk)

    return script


class Scripted:
    """A speaker that runs a test's script for every request, each in a thread; it fails with what the script raises."""

    sample_rate = RATE

    def __init__(self, script: Script, longest_queue: int = 8):
        self.script, self.longest = script, longest_queue
        self.linger = 0.0  # between the last chunk and letting go, as a thread may be slow to
        self.requests: list[SpeechRequest] = []
        self.speeches: list[Speech] = []

    def voices(self) -> list[str]:
        return ["default", "iris", "magnus"]

    def about(self) -> dict[str, Any]:
        return {"artifact": "scripted", "quantization": {"llm": "int8", "flow": "int8", "vocoder": "fp32"}}

    def submit(self, request: SpeechRequest) -> Speech:
        if sum(not speech.released.is_set() for speech in self.speeches) >= self.longest:
            raise BusyError(f"{self.longest} requests are waiting", retry_after=1.5)
        speech = Speech(request)
        self.requests.append(request)
        self.speeches.append(speech)
        threading.Thread(target=self._run, args=(speech,), daemon=True).start()
        return speech

    def _run(self, speech: Speech) -> None:
        error: Any = None
        try:
            if getattr(self.script, "begins", True):
                speech.begin()
            self.script(speech)
        except Exception as raised:
            error = raised
        speech.end(error)
        time.sleep(self.linger)
        speech.release()

    def stats(self) -> Stats:
        return Stats(waiting=2, active=1, retry_after=1.5, memory_bytes=123)

    def close(self) -> None:
        for speech in self.speeches:
            speech.cancel()


def until_cancelled(speech: Speech, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not speech.cancelled and time.monotonic() < deadline:
        time.sleep(0.002)


@dataclass
class Running:
    service: Service
    server: Server
    thread: threading.Thread
    port: int

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="any", max_retries=0, timeout=60)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        connection = self.open(method, path, body, **headers)
        response = connection.getresponse()
        answer = Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        connection.close()
        return answer

    def open(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPConnection:
        """Send a request; whoever asked reads, or leaves."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        about = {"content-type": "application/json"} if data is not None else {}
        connection.request(method, path, data, {**about, **{k.replace("_", "-"): v for k, v in headers.items()}})
        return connection

    def speak(self, **fields: Any) -> Answer:
        return self.request("POST", "/v1/audio/speech", {**BODY, **fields})

    def broken_events(self, **fields: Any) -> list[Any]:
        """The events of a stream that breaks off."""
        response = self.open("POST", "/v1/audio/speech", {**BODY, "stream_format": "sse", **fields}).getresponse()
        try:
            raise AssertionError(f"it ended as if it were whole: {response.read()[-200:]!r}")
        except http.client.IncompleteRead as error:
            return events_of(error.partial)

    def metric(self, name: str) -> float:
        return metric_of(self.request("GET", "/metrics").body.decode(), name)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of a refusal in OpenAI's shape, and nothing beside it."""
        assert self.status >= 400, self.body[:200]
        assert self.headers["content-type"] == "application/json"
        assert set(self.json) == {"error"}
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert "Traceback" not in error["message"]
        return error


@contextmanager
def running(loader: Loader, *, wait: bool = True, **settings: Any) -> Iterator[Running]:
    listening = listen("127.0.0.1", 0)
    service = Service(Settings(**settings))
    server = Server(service, loader)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    port = listening.getsockname()[1]
    thread.start()
    try:
        if wait:
            wait_for(lambda: service.phase != "loading")
        yield Running(service, server, thread, port)
    finally:
        server.stop(0)
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def scripted(script: Script, *, longest_queue: int = 8, **settings: Any) -> Iterator[tuple[Running, Scripted]]:
    speaker = Scripted(script, longest_queue)
    with running(lambda _: speaker, **settings) as server:
        yield server, speaker


@dataclass
class Endpoint:
    """A server that is reached over HTTP alone."""

    port: int

    def client(self, key: str = "any") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=120)

    def open(self, body: dict[str, Any]) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", "/v1/audio/speech", json.dumps(body), {"content-type": "application/json"})
        return connection

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()

    def metric(self, name: str) -> float:
        return metric_of(self.get("/metrics")[1], name)


class Process(Endpoint):
    """`cosyq serve` as a process of its own."""

    def __init__(self, artifact: Path, folder: Path, *arguments: str, **environment: str):
        self.log = folder / "log"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("COSYQ_", "QUANTIZATION_"))}
        with self.log.open("wb") as log:
            command = [*COSYQ, "serve", "-a", str(artifact), "--port", "0", "--device", "cpu", *arguments]
            clean |= {"OMP_WAIT_POLICY": "PASSIVE"}  # no thread spins beside others
            self.process = subprocess.Popen(command, stderr=log, env=clean | environment)
        super().__init__(wait_for(lambda: self.logged("listening"))["port"])
        wait_for(lambda: self.logged("ready"), 60)

    def logged(self, message: str) -> Any:
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return next((line for line in lines if line["message"] == message), None)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)


def metric_of(text: str, name: str) -> float:
    return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + " ")), 0.0)


def decoded(data: bytes, format: str) -> tuple[np.ndarray, int]:
    """(samples [n] in -1..1, their rate) of a response."""
    if format == "pcm":
        return np.frombuffer(data, "<i2") / 32768, RATE
    with av.open(io.BytesIO(data)) as container:
        resampler = av.AudioResampler(format="flt", layout="mono")
        frames = [f for frame in container.decode(audio=0) for f in resampler.resample(frame)]
    return np.concatenate([frame.to_ndarray()[0] for frame in frames]), frames[0].sample_rate


def seconds_of(data: bytes, format: str) -> float:
    samples, rate = decoded(data, format)
    return len(samples) / rate


def events_of(body: bytes) -> list[Any]:
    """The events of an SSE body: objects, and the text [DONE]."""
    blocks = body.decode().split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    return [text if (text := block[6:]) == "[DONE]" else json.loads(text) for block in blocks]
