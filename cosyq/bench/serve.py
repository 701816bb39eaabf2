"""The same requests over HTTP, of a `cosyq serve` in a process of its own: what a client hears, and what that costs."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from cosyq.artifact.manifest import FILE_NAME, VOICE_FOLDER
from cosyq.artifact.reader import Artifact
from cosyq.bench.parts import WORDS
from cosyq.bench.streams import Answers, Heard, Load, Streams, answers
from cosyq.bench.timing import Say, Spread
from cosyq.errors import CosyqError, DeviceError
from cosyq.runtime.request import Manner
from cosyq.voices.voice import Voice

ALONE = 20  # requests one after another, on either side, of which the cost is
HOST = "127.0.0.1"
START_SECONDS, LOOK_SECONDS = 600, 0.05  # a server has to be ready, and is asked whether it is
LONG = 86_400  # seconds: here no request is given up
LAST_WORDS = 1000  # characters of what a server said before it failed


@dataclass(frozen=True)
class Served:
    """streams: as a server's clients hear them, in bytes of pcm.

    The others are of `requests` asked one after another, and the costs are differences between the server and the
    engine by itself with the same seed, to the first audio and to the end.
    """

    streams: tuple[Streams, ...]
    requests: int
    first_audio_seconds: Spread
    engine_first_audio_seconds: Spread
    first_audio_cost_seconds: Spread
    whole_cost_seconds: Spread

    @classmethod
    def of(cls, served: Answers, engine: Answers) -> Served:
        pairs = list(zip(served.alone, engine.alone, strict=True))
        return cls(
            streams=served.streams,
            requests=len(pairs),
            first_audio_seconds=Spread.of(heard.first for heard, _ in pairs),
            engine_first_audio_seconds=Spread.of(own.first for _, own in pairs),
            first_audio_cost_seconds=Spread.of(heard.first - own.first for heard, own in pairs),
            whole_cost_seconds=Spread.of(heard.whole - own.whole for heard, own in pairs),
        )


def over_http(
    artifact: Artifact, manner: Manner, place: dict[str, str], load: Load, rows: int, device: torch.device, say: Say
) -> Answers:
    """Ask a server of the same artifact, from threads of this process.

    Args:
        place: the options engine, device and dtype, of which the device is a certain one.
        rows: how many it speaks at once.

    Raises:
        CosyqError: it did not start, or failed while it spoke; with the last of what it said.
        DeviceError: it could not have the device.
    """
    say("starting a server")
    with (
        tempfile.TemporaryDirectory(prefix="cosyq-bench-") as scratch,
        ThreadPoolExecutor(max(load.counts), "client") as pool,
    ):
        folder = Path(scratch) / "artifact"
        voice = link_with_voice(artifact, manner.voice, folder)
        options = {**place, "max-concurrency": str(rows), "queue": str(max(load.counts))}
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        with serving(["-a", str(folder), *words], Path(scratch) / "log") as port:
            wanted = {"model": "tts-1", "voice": voice, "input": WORDS, "response_format": "pcm"}
            rate = artifact.manifest.model.vocoder.sample_rate

            def ask(seed: int) -> Heard:
                return hear(port, {**wanted, "seed": seed}, rate)

            return answers(ask, load, rows, pool, device, lambda what: say(f"over HTTP, {what}"))


def link_with_voice(artifact: Artifact, voice: Voice, folder: Path) -> str:
    """Make a folder that holds an artifact by links, and a voice beside its own; returns the voice's name there."""
    for name in {FILE_NAME, *artifact.manifest.files}:
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((artifact.folder / name).resolve())
    name = f"bench-{secrets.token_hex(8)}"
    path = folder / VOICE_FOLDER / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    with path.open("xb") as file:  # never through a link into the artifact
        file.write(voice.to_bytes())
    return name


@contextmanager
def serving(options: Sequence[str], log: Path) -> Iterator[int]:
    """`cosyq serve` with these options on a free port, which is yielded when it is ready; it ends with the block.

    What it says goes to a file, so that nobody here has to read along while it is measured.

    Raises:
        CosyqError: it did not get ready, or the block raised one; with the last of what it said.
        DeviceError: it could not have the device.
    """
    command = [sys.executable, "-m", "cosyq", "serve", "--host", HOST, "--port", "0", *options]
    command += ["--wait", str(LONG), "--deadline", str(LONG)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COSYQ_")}
    with (
        log.open("wb") as said,
        subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said) as process,
    ):
        try:
            yield _ready_port(process, log)
        except DeviceError:
            raise
        except CosyqError as error:
            raise CosyqError(f"{error.what}; it said: {_last_words(log)}") from None
        finally:
            process.kill()


def hear(port: int, wanted: dict[str, object], sample_rate: int) -> Heard:
    """Ask for pcm on a connection of its own, as a client does that has none yet.

    Raises:
        CosyqError: it is not answered with audio to the end.
    """
    return Heard.of(_answer(port, wanted), 2 * sample_rate)


def _answer(port: int, wanted: dict[str, object]) -> Iterator[int]:
    """Bytes, as they come."""
    connection = http.client.HTTPConnection(HOST, port)
    try:
        body = json.dumps(wanted).encode()
        connection.request("POST", "/v1/audio/speech", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise CosyqError(
                f"the server answered {answer.status} ({answer.read(LAST_WORDS).decode('utf-8', 'replace')})"
            )
        while data := answer.read1():
            yield len(data)
    except (OSError, http.client.HTTPException) as error:
        raise CosyqError(f"the server broke off ({type(error).__name__})") from None
    finally:
        connection.close()


def _ready_port(process: subprocess.Popen[bytes], log: Path) -> int:
    deadline, port = time.monotonic() + START_SECONDS, None
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise CosyqError(f"the server was not ready in {START_SECONDS} seconds")
        port = port or _port(log)
        if port is not None and _is_ready(port):
            return port
        time.sleep(LOOK_SECONDS)
    if process.returncode == DeviceError.exit_code:
        raise DeviceError(f"a server cannot have the device; it said: {_last_words(log)}")
    raise CosyqError("the server ended before it was ready")


def _port(log: Path) -> int | None:
    """The one that it says it listens on, once it does."""
    for line in log.read_text("utf-8", "replace").splitlines():
        with suppress(ValueError, AttributeError):  # no JSON, half a line, or no object
            if (entry := json.loads(line)).get("message") == "listening":
                return int(entry["port"])
    return None


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _last_words(log: Path) -> str:
    return log.read_text("utf-8", "replace").strip()[-LAST_WORDS:] or "nothing"
