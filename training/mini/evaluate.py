"""How well artifacts speak the held-out sentences: word error rate beside the teacher's, MOS, runaways.

    python -m training.mini.evaluate --artifact DIR [--artifact DIR ...] [--voice NAME ...] [--json FILE]

The judges are `cosyq eval`'s; what is here is the teacher. Needs faster-whisper and its model's two packages,
distillmos and hibari-tts; see README.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import cosyq
from cosyq.eval.metric import judge
from cosyq.eval.metrics import ERRORS, MOS, RUNAWAY, TRUNCATED
from cosyq.eval.opinion import Opinion
from cosyq.eval.recognizers import recognizer
from cosyq.eval.spoken import Judged, Judges, hear, series_of
from training.mini.config import SAMPLE_RATE
from training.mini.data import Teacher
from training.mini.samples import write_wav
from training.mini.sentences import held_out

ROWS = (ERRORS, MOS, RUNAWAY, TRUNCATED)

Wave = NDArray[np.float32]  # [n] at 24 kHz


def report(name: str, heard: list[Judged]) -> dict[str, object]:
    """Print a line of the table; returns it as data."""
    found = {metric.key: judge(series) for metric in ROWS if (series := series_of(metric, [heard])) is not None}
    errors = found[ERRORS.key].artifact
    mos, runaways, cut = (found[metric.key].artifact.value for metric in ROWS[1:])
    words = f"{errors.value:.1f} % ({errors.low:.1f} to {errors.high:.1f})"
    print(f"{name:<36}{words:>24}{mos:>7.2f}{runaways:>8.0f} %{cut:>6.0f} %", flush=True)
    return {
        "name": name,
        "metrics": {key: asdict(finding.artifact) for key, finding in found.items()},
        "sentences": [item.rendition().values | {"understood": item.understood} for item in heard],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, action="append", default=[])
    parser.add_argument("--voice", action="append", help="default: the artifact's own")
    parser.add_argument("--limit", type=int, help="only the first sentences")
    parser.add_argument("--no-teacher", action="store_true")
    parser.add_argument("--recognizer", default="whisper", help="as `cosyq eval` names them")
    parser.add_argument("--wavs", type=Path, help="keep the audio in this folder")
    parser.add_argument("--json", type=Path, help="write everything here")
    args = parser.parse_args()
    sentences, judges = held_out()[0][: args.limit], Judges(recognizer(args.recognizer), Opinion())
    results: list[dict[str, object]] = []

    def run(name: str, speak: Callable[[str], tuple[Wave, str]]) -> None:
        heard = []
        for number, sentence in enumerate(sentences):
            wave, finish = speak(sentence)
            heard.append(hear(sentence, wave, SAMPLE_RATE, finish, None, judges))
            if args.wavs:
                args.wavs.mkdir(parents=True, exist_ok=True)
                write_wav(args.wavs / f"{name.replace('/', '-')}-{number:02d}.wav", torch.from_numpy(wave))
        results.append(report(name, heard))

    print(f"{'':<36}{'word error rate (95 %)':>24}{'MOS':>7}{'runaways':>10}{'cut':>8}")
    if not args.no_teacher:
        teacher = Teacher()
        run("teacher", lambda text: (teacher.read(text, 0).wave.astype(np.float32) / 32768, "stop"))
    for artifact in args.artifact:
        synthesizer = cosyq.load(artifact)
        for voice in args.voice or [None]:

            def speak(text: str, voice: str | None = voice, synthesizer=synthesizer) -> tuple[Wave, str]:
                audio = synthesizer.synthesize(text, voice=voice, seed=0)
                return audio.samples, audio.timings.finish

            run(f"{artifact.name}/{voice or 'default'}", speak)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
