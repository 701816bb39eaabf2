"""How fast an artifact speaks on this machine's GPU: every stage by itself, a sentence, a stream, and a cold start.

    python tests/gpu/speed.py ARTIFACT... --voice FILE [--engine NAME] [--cold | --only-cold]

Weights may be random: what a stage costs does not depend on what it says. Prints one JSON line an artifact. Ten seconds
of audio after a prompt of three; medians of runs behind three that warm up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import cosyq
from cosyq.model.vocoder import StreamState
from cosyq.runtime.decode import Part
from cosyq.voices.voice import Voice, load_voice

SECONDS, TOKENS, RUNS = 10, 250, 7
WORDS = "the quick brown fox jumps over the lazy dog and then it rests. "
BARE = "import torch; torch.zeros(1).cuda(); torch.cuda.synchronize()"
COLD = """
import sys
from pathlib import Path
import cosyq
from cosyq.voices.voice import load_voice
tts = cosyq.load(sys.argv[1], device="cuda", engine=sys.argv[3])
next(tts.stream(sys.argv[4], voice=load_voice(Path(sys.argv[2]), tts.engine.config.flow), seed=1))
"""


def seconds(work) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def median(work, runs: int = RUNS) -> float:
    for _ in range(3):
        work()
    return statistics.median(seconds(work) for _ in range(runs))


def measure(artifact: str, voice_file: str, engine: str) -> dict:
    found: dict = {}
    started = time.perf_counter()
    tts = cosyq.load(artifact, device="cuda", engine=engine)
    networks = tts.engine
    found |= {"engine": networks.name, "load_s": round(time.perf_counter() - started, 2)}
    found["held_MiB"] = round(torch.cuda.memory_allocated() / 2**20, 1)
    voice: Voice = load_voice(Path(voice_file), networks.config.flow)
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(0, 1000, (30,), generator=draw).tolist()
    speech = voice.prompt_tokens.tolist()
    c = networks.config.llm
    shown = (([], [c.sos]), (text, [c.task_id, *speech]))

    def decode():
        part = Part(shown=shown, minimum=TOKENS, maximum=TOKENS)
        generator = torch.Generator().manual_seed(1)
        return list(
            networks.speech_tokens([part], positions=len(text) + len(speech) + 2, room=TOKENS, generator=generator)
        )

    def prefill():
        next(iter(networks.speech_tokens([Part(shown=shown, minimum=1, maximum=1)], positions=300, room=TOKENS,
                                         generator=torch.Generator().manual_seed(1))))  # fmt: skip

    tokens = decode()
    found["tokens"] = len(tokens)
    found["prefill_ms"] = round(1e3 * median(prefill), 2)
    found["tokens_per_s"] = round(TOKENS / median(decode), 1)
    mel = networks.mel(tokens, voice, streaming=False, final=True, steps=10)
    flow = median(lambda: networks.mel(tokens, voice, streaming=False, final=True, steps=10))
    vocode = median(lambda: networks.samples(mel, StreamState(), final=True))
    found |= {"flow_ms": round(1e3 * flow, 2), "vocoder_ms": round(1e3 * vocode, 2)}
    audio = tts.synthesize(WORDS, voice=voice, seed=1)
    whole = median(lambda: tts.synthesize(WORDS, voice=voice, seed=1))
    found |= {"audio_s": round(len(audio.samples) / tts.sample_rate, 2)}
    found["real_time_factor"] = round(whole * tts.sample_rate / len(audio.samples), 4)

    def first():
        stream = tts.stream(WORDS, voice=voice, seed=1)
        next(stream)
        stream.close()

    found["first_audio_ms"] = round(1e3 * median(first), 2)
    streamed = median(lambda: sum(len(a.samples) for a in tts.stream(WORDS, voice=voice, seed=1)), 3)
    found["stream_real_time_factor"] = round(streamed * tts.sample_rate / len(audio.samples), 4)
    found["peak_MiB"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    found["peak_reserved_MiB"] = round(torch.cuda.max_memory_reserved() / 2**20, 1)
    return found


def cold(artifact: str, voice: str, engine: str) -> dict:
    def process(code: str, *arguments: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
        return time.perf_counter() - started

    process(COLD, artifact, voice, engine, WORDS)  # compiles what is not cached yet
    bare = statistics.median(process(BARE) for _ in range(2))
    ours = statistics.median(process(COLD, artifact, voice, engine, WORDS) for _ in range(2))
    return {"bare_s": round(bare, 2), "cold_start_s": round(ours, 2), "ratio": round(ours / bare, 2)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("artifacts", nargs="+")
    parser.add_argument("--voice", required=True)
    parser.add_argument("--engine", default="fused")
    parser.add_argument("--cold", action="store_true", help="the time from a process' start to its first audio, too")
    parser.add_argument("--only-cold", action="store_true")
    options = parser.parse_args()
    for artifact in options.artifacts:
        found: dict = {"artifact": Path(artifact).name}
        if not options.only_cold:
            torch.cuda.reset_peak_memory_stats()
            found |= measure(artifact, options.voice, options.engine)
        if options.cold or options.only_cold:
            found |= cold(artifact, options.voice, options.engine)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
