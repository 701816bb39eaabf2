"""Full size on this machine's GPU: make a random checkpoint, quantize it, speak ten seconds, print a table.

    python tests/gpu/measure.py [--folder DIR] [--engine NAME]... [RECIPE...]

Every step is a process of its own, so that start-up, peaks and timings are those a user sees.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = "the quick brown fox jumps over the lazy dog and then it rests " * 4  # at least 250 speech tokens


def cosyq(*arguments: str) -> dict:
    done = subprocess.run([sys.executable, "-m", "cosyq", *arguments, "--json"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"cosyq {' '.join(arguments)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipes", nargs="*", default=["int8", "nf4"])
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--engine", action="append")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        print("random checkpoint:", cosyq("checkpoint", "random", str(checkpoint)))
    rows = []
    for recipe in options.recipes:
        artifact = folder / recipe
        built = cosyq(
            "quantize", recipe, "--source", str(checkpoint), "-o", str(artifact), "--device", "cuda", "--force",
            "--set", "voices=[]",  # a random checkpoint has no encoders
        )  # fmt: skip
        voice = str(checkpoint / "voice.safetensors")
        for engine in options.engine or ["reference", "bnb"]:
            spoken = cosyq(
                "synth", WORDS, "-a", str(artifact), "-v", voice, "-o", str(folder / f"{recipe}-{engine}.wav"),
                "--seed", "1", "--engine", engine, "--device", "cuda",
            )  # fmt: skip
            rows.append((recipe, engine, built, spoken))
    print(f"on {rows[0][2]['device']}")
    head = (
        "recipe | engine | quantize s | host GB | artifact MB | load s | audio s | peak MiB | tokens/s | first s | rtf"
    )
    print(head)
    for recipe, engine, built, spoken in rows:
        values = (
            recipe, engine, f"{built['seconds']:.1f}", f"{built['peak_host_bytes'] / 1e9:.2f}", f"{built['bytes'] / 1e6:.1f}",
            f"{spoken['load_seconds']:.2f}", f"{spoken['audio_seconds']:.2f}", f"{spoken['peak_memory_bytes'] / 2**20:.0f}",
            f"{spoken['tokens_per_second']:.1f}", f"{spoken['first_audio_seconds']:.2f}", f"{spoken['real_time_factor']:.3f}",
        )  # fmt: skip
        print(" | ".join(values))


if __name__ == "__main__":
    main()
