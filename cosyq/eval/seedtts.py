"""SEED-TTS-eval's lists: each line a recording to speak like, and a text to say.

Anastassiou et al., Seed-TTS: a family of high-quality versatile speech generation models (2024); format and scoring
as in github.com/BytedanceSpeech/seed-tts-eval. A line is

    utterance | transcript of the prompt | recording of the prompt | text to say [ | a recording of that text ]

with paths relative to the list; the last column is for voice conversion and not read here. Error rates are scored as
`run_wer.py` and `average_wer.py` do: punctuation dropped but for the apostrophe, Chinese by characters in simplified
script, English by words in lower case, numbers left as they are, and the rate is the mean of the utterances' own rates.
Two things differ: punctuation is what Unicode says rather than the zhon package's list, and a recognizer is at 16 kHz
by soxr. Published figures are of whisper-large-v3 for English and Paraformer-zh for Mandarin; use the same. The
published similarity is of a fine-tuned WavLM-large, ours of the checkpoint's own speaker encoder: compare it between
artifacts, not with the published one.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath

from cosyq.audio.recording import read_recording
from cosyq.errors import UsageError
from cosyq.eval.scoring import Scoring, in_simplified
from cosyq.model.config import FlowConfig
from cosyq.sequences import Progress
from cosyq.voices.enrol import Encoders, check_take, enrol
from cosyq.voices.voice import MAX_TRANSCRIPT, NAME, Voice

MAX_BYTES = 16 << 20  # the published lists are below one
MAX_LINES = 20_000
COLUMNS = (4, 5)


@dataclass(frozen=True)
class Line:
    """utterance: its id; transcript: of the prompt; prompt: the recording's file; text: what to say."""

    utterance: str
    transcript: str
    prompt: Path
    text: str


def read_list(path: Path, limit: int | None = None) -> list[Line]:
    """The lines of a list, the first `limit` of them.

    Raises:
        UsageError: it is no such list, or names files outside of its folder.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"more than {MAX_BYTES} bytes: no list", where=path)
        content = path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(f"not readable as a list ({error})", where=path) from None
    numbered = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not 0 < len(numbered) <= MAX_LINES:
        raise UsageError(f"has {len(numbered)} lines, expected 1 to {MAX_LINES}", where=path)
    return [_line(line, path.parent, f"{path}, line {number}") for number, line in numbered[:limit]]


def _line(line: str, folder: Path, where: str) -> Line:
    columns = [column.strip() for column in line.split("|")]
    if len(columns) not in COLUMNS:
        remedy = "utterance|transcript of the prompt|recording|text to say"
        raise UsageError(f"has {len(columns)} columns, expected 4 or 5", where=where, remedy=remedy)
    utterance, transcript, prompt, text = columns[:4]
    if not NAME.fullmatch(utterance):
        raise UsageError(f"no utterance's name: {utterance:.40}", where=where)
    if not text or any(len(part) > MAX_TRANSCRIPT or not _plain(part) for part in (transcript, text)):
        raise UsageError(f"a text is empty, longer than {MAX_TRANSCRIPT} characters or no plain text", where=where)
    return Line(utterance, transcript, folder / _inside(prompt, where), text)


def _inside(name: str, where: str) -> PurePosixPath:
    """A path that stays in the list's folder: a list is somebody else's, and what it names is opened."""
    path = PurePosixPath(name)
    windows = PureWindowsPath(name)
    outside = path.is_absolute() or windows.drive or windows.root or ".." in (*path.parts, *windows.parts)
    if not path.parts or outside or not _plain(name):
        raise UsageError(f"no path inside of the list's folder: {name!r:.60}", where=where)
    return path


def _plain(text: str) -> bool:
    return not any(unicodedata.category(c) in ("Cc", "Cs") for c in text)


class Prompts:
    """The voice of every line, made of its recording when it is asked for: thousands would fill the memory.

    Every recording is read once beforehand, so that one that will not do is found before anything is spoken.

    Raises:
        UsageError: a recording is missing or not usable, or its transcript cannot be of it.
    """

    def __init__(self, lines: Sequence[Line], encoders: Encoders, config: FlowConfig, progress: Progress):
        self._lines, self._encoders, self._config = lines, encoders, config
        for index, line in enumerate(lines):
            progress(line.utterance, index, len(lines))
            check_take(line.utterance, read_recording(line.prompt), line.transcript)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Voice:
        line = self._lines[index]
        return enrol(line.utterance, read_recording(line.prompt), line.transcript, self._encoders, self._config)


def units(text: str, language: str | None) -> list[str]:
    """As the published scoring has them."""
    kept = "".join(c for c in text if not _dropped(c))
    if language == "zh":
        return [c for c in in_simplified(kept) if not c.isspace()]
    return kept.lower().split()


@lru_cache(maxsize=4096)
def _dropped(character: str) -> bool:
    half = unicodedata.normalize("NFKC", character)
    return character != "'" and (unicodedata.category(character)[0] == "P" or half in set(string.punctuation))


AS_PUBLISHED = Scoring(units, alike=True)
