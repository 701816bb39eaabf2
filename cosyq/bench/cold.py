"""From the start of a process to its first audio, beside one that only imports torch and takes the device into use."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cosyq.bench.parts import SEED, WORDS
from cosyq.bench.timing import Say, Spread
from cosyq.errors import CosyqError
from cosyq.runtime.request import Manner

COLD_RUNS = 3
BARE = """
import sys, torch
torch.zeros(1, device=sys.argv[1])
torch.cuda.synchronize() if sys.argv[1].startswith("cuda") else None
print("ready", flush=True)
"""


@dataclass(frozen=True)
class Cold:
    """`cosyq synth --stream`, until its first sample is in a pipe."""

    bare_seconds: Spread
    first_audio_seconds: Spread

    @property
    def ratio(self) -> float:
        return self.first_audio_seconds.median / self.bare_seconds.median


def cold_start(folder: Path, manner: Manner, place: dict[str, str], runs: int, say: Say) -> Cold:
    """Bare and ours in turn, behind one of each that reads what is not in memory yet and compiles what is not compiled.

    Args:
        folder: the artifact's.
        place: the options engine, device and dtype, of which the device is a certain one.

    Raises:
        CosyqError: a process ended before it had anything to say.
    """
    with tempfile.TemporaryDirectory(prefix="cosyq-bench-") as scratch:
        voice = Path(scratch) / "voice.safetensors"
        voice.write_bytes(manner.voice.to_bytes())
        ours = [sys.executable, "-m", "cosyq", "synth", WORDS, "-a", str(folder), "-v", str(voice)]
        ours += ["--stream", "--raw", "-o", "-", "--seed", str(SEED), "--flow-steps", str(manner.steps)]
        ours += [word for name, value in place.items() for word in (f"--{name}", value)]
        bare = [sys.executable, "-c", BARE, place["device"]]
        times = []
        for turn in range(1 + runs):
            say(f"cold start, run {turn + 1} of {1 + runs}")
            times.append((until_it_speaks(bare), until_it_speaks(ours)))
    return Cold(Spread.of(b for b, _ in times[1:]), Spread.of(o for _, o in times[1:]))


def until_it_speaks(command: list[str]) -> float:
    """Seconds from a process's start to its first byte on stdout; then it is ended.

    Raises:
        CosyqError: it ended by itself, without one.
    """
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=False) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            spoke, passed = process.stdout.read(1), time.perf_counter() - started
            if not spoke:
                said = process.stderr.read().decode("utf-8", "replace").strip().splitlines()
                raise CosyqError(f"a process ended without audio ({said[-1] if said else 'nothing said'})")
            return passed
        finally:
            process.kill()
