"""Load on a server of its own, over HTTP: first audio, audio seconds a second, who was refused.

    python tests/load.py ARTIFACT [--streams 1,4,16] [--rounds 3] [--rows 16] [--sentences 2] [--device cuda] [--soak SECONDS]

Every stream asks for one text after another, in each of the artifact's voices in turn. Prints one line of JSON:
seconds to the first audio (p50, p95), audio seconds made in a second, real-time factor of a stream, and what the server
takes, in MiB. With --soak, some of the streams leave early, and memory is read at a quarter of the time and at the end.
The engine behind it is measured by `cosyq bench --parts streams`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from itertools import count

SENTENCE = "the quick brown fox jumps over the lazy dog and then it rests for a while in the warm afternoon sun. "
RATE = 24_000


@dataclass
class Tally:
    first: list[float] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)
    audio: float = 0.0
    refused: int = 0
    broken: int = 0
    left: int = 0
    seconds: float = 0.0

    def heard(self, first: float, seconds: float, audio: float) -> None:
        self.first.append(first)
        self.factors.append(seconds / audio if audio else 0.0)
        self.audio += audio

    def summary(self) -> dict:
        ranked = sorted(self.first) or [0.0]
        return {
            "requests": len(self.first),
            "first_audio_p50_ms": round(1000 * statistics.median(ranked), 1),
            "first_audio_p95_ms": round(1000 * ranked[min(int(0.95 * len(ranked)), len(ranked) - 1)], 1),
            "audio_seconds_per_second": round(self.audio / self.seconds, 2),
            "real_time_factor": round(statistics.median(self.factors or [0.0]), 4),
            **{name: value for name in ("refused", "broken", "left") if (value := getattr(self, name))},
        }


async def ask(port: int, body: dict, tally: Tally, leave_after: float | None = None) -> None:
    started, first, size = time.perf_counter(), 0.0, 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps(body).encode()
        head = f"POST /v1/audio/speech HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
        writer.write(f"{head}\r\nconnection: close\r\n\r\n".encode() + data)
        answer = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in answer.split(b"\r\n")[0]:
            tally.refused += 1
            await asyncio.sleep(0.2)
            return
        while length := int(await reader.readuntil(b"\r\n"), 16):
            first = first or time.perf_counter() - started
            size += length
            await reader.readexactly(length + 2)
            if leave_after is not None and time.perf_counter() - started > leave_after:
                tally.left += 1
                return
        tally.heard(first, time.perf_counter() - started, size / 2 / RATE)
    except (asyncio.IncompleteReadError, ConnectionError):
        tally.broken += 1
    finally:
        writer.close()


async def over_http(
    port: int, text: str, streams: int, voices: list[str], *, rounds: int, until: float | None = None
) -> Tally:
    tally, numbers, started = Tally(), count(), time.perf_counter()

    async def stream() -> None:
        for turn in count():
            if turn >= rounds if until is None else time.perf_counter() >= until:
                return
            number = next(numbers)
            body = {"model": "tts-1", "input": text, "voice": voices[number % len(voices)], "seed": number}
            leaves = None if until is None or number % 5 else 0.05 * (number % 10)
            await ask(port, {**body, "response_format": "pcm"}, tally, leaves)

    await asyncio.gather(*(stream() for _ in range(streams)))
    tally.seconds = time.perf_counter() - started
    return tally


def resident(pid: int) -> int:
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) // 1024


class Server:
    def __init__(self, artifact: str, rows: int, device: str):
        command = [sys.executable, "-m", "cosyq", "serve", "-a", artifact, "--port", "0", "--device", device]
        command += ["--max-concurrency", str(rows)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.port = self.about = None
        for line in self.process.stderr:
            entry = json.loads(line) if line.startswith("{") else {"message": line}
            if entry["message"] == "listening":
                self.port = entry["port"]
            if entry["message"] == "ready":
                self.about = entry
                break
        if self.about is None:
            sys.exit("the server did not start")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def get(self, path: str) -> dict:
        import urllib.request

        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}") as answer:
            return json.load(answer)

    def memory(self) -> dict:
        return {
            "host_mib": resident(self.process.pid),
            "gpu_mib": round(self.get("/health")["memory_bytes"] / 2**20),
        }

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def http(options: argparse.Namespace, rows: int) -> dict:
    text = SENTENCE * options.sentences
    server = Server(options.artifact, rows, options.device)
    try:
        voices = [voice["id"] for voice in server.get("/v1/audio/voices")["voices"]]
        result: dict = {}
        if options.soak:
            for part, share in (("first quarter", 0.25), ("rest", 0.75)):
                until = time.perf_counter() + share * options.soak
                tally = asyncio.run(over_http(server.port, text, max(options.streams), voices, rounds=0, until=until))
                result[part] = tally.summary() | server.memory()
            return result
        asyncio.run(over_http(server.port, text, max(options.streams), voices, rounds=1))
        for streams in options.streams:
            result[str(streams)] = asyncio.run(
                over_http(server.port, text, streams, voices, rounds=options.rounds)
            ).summary()
        return result | server.memory()
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact")
    parser.add_argument("--streams", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="of the batch; as many as streams unless given")
    parser.add_argument("--sentences", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--soak", type=float)
    options = parser.parse_args()
    rows, result = options.rows or max(options.streams), {"artifact": os.path.basename(options.artifact.rstrip("/"))}
    print(json.dumps(result | {"http": http(options, rows)}))


if __name__ == "__main__":
    main()
