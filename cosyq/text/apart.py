"""A tokenizer that another process has read, while this one imported torch.

The library takes half a second for a file of 150,000 pieces, and no thread can run Python meanwhile.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Protocol

from cosyq.text.tokenizer import TextTokenizer


class Tokenizer(Protocol):
    """Text to ids, special tokens recognised."""

    end_of_prompt: int

    def __len__(self) -> int:
        """How many ids there are."""

    def encode(self, text: str) -> list[int]:
        """Raises as the library does on what is no text."""


class _Apart:
    """A `TextTokenizer` in a child, which ends with this process. When the child is no more, it is read here."""

    def __init__(self, path: Path):
        self._path, self._lock = path, Lock()
        self._here: TextTokenizer | None = None
        asked, asks = os.pipe()
        answered, answers = os.pipe()
        if os.fork() == 0:
            os.close(asks)
            os.close(answered)
            _answer(path, asked, answers)
        os.close(asked)
        os.close(answers)
        self._questions = os.fdopen(asks, "wb", buffering=0)
        self._answers = os.fdopen(answered, "rb")

    def read(self) -> Tokenizer:
        """Raises as `TextTokenizer` and reading its file do."""
        with suppress(OSError, ValueError):
            self.size, self.end_of_prompt = json.loads(self._answers.readline())
            return self
        return _read(self._path)

    def __len__(self) -> int:
        return self.size

    def encode(self, text: str) -> list[int]:
        with self._lock:
            if self._here is None:
                with suppress(OSError, ValueError):
                    self._questions.write(json.dumps(text).encode() + b"\n")
                    ids: list[int] = json.loads(self._answers.readline())
                    return ids
                self._here = _read(self._path)
            return self._here.encode(text)


def _answer(path: Path, asked: int, answers: int) -> None:
    """The child: what it read first, then the ids of each text; it never returns."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end is the end of the questions
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        tokenizer = _read(path)
        with os.fdopen(asked, "rb") as questions, os.fdopen(answers, "wb", buffering=0) as out:
            out.write(json.dumps([len(tokenizer), tokenizer.end_of_prompt]).encode() + b"\n")
            for line in questions:
                out.write(json.dumps(tokenizer.encode(json.loads(line))).encode() + b"\n")
    finally:
        os._exit(0)


def _read(path: Path) -> TextTokenizer:
    return TextTokenizer(path.read_text("utf-8"))


_begun: dict[Path, _Apart] = {}


def may_fork() -> bool:
    """Not beside other threads, or on a single core."""
    return sys.platform == "linux" and len(os.sched_getaffinity(0)) > 1 and len(os.listdir("/proc/self/task")) == 1


def begin(path: Path) -> None:
    """Begin to read a tokenizer.json, for `tokenizer_of` to find, where a child may be forked for it."""
    if path not in _begun and may_fork():
        with suppress(OSError):
            _begun[path] = _Apart(path)


def tokenizer_of(path: Path) -> Tokenizer:
    """That of a tokenizer.json.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no tokenizer.json that knows `<|endofprompt|>`.
    """
    apart = _begun.pop(path, None)
    return _read(path) if apart is None else apart.read()
