"""cosyq synth --jsonl: a line of JSON in, an audio file and a line of JSON out.

Beside each audio file `x.wav` stands `x.wav.json`: the result line, and the digest of all that it was made from. It
is removed before and written after the audio, so an audio file that has it is the one that it describes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, field_validator

from cosyq.audio.sinks import FORMATS, file_sink
from cosyq.cli.console import expect, note, progress_bar
from cosyq.errors import ArtifactError, CosyqError, ReaderGoneError, UsageError
from cosyq.files import whole_file
from cosyq.runtime.synthesizer import Synthesizer
from cosyq.text.prompt import speakable
from cosyq.voices.voice import Voice

MAX_LINE = 1 << 20  # bytes
MAX_LINES = 1_000_000  # their files' names are remembered
MAX_RECORD = 1 << 16  # bytes
MAX_PROBLEMS = 5  # of one line, told

NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"
OUT = re.compile(rf"({NAME}/){{0,8}}{NAME}")
OPTIONS = ("seed", "speed", "instruct")


class Line(BaseModel):
    """What one line may say. What it leaves out, the command line's options decide."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: Annotated[str, StringConstraints(pattern=rf"^{NAME}$")]
    text: str
    voice: Annotated[str, StringConstraints(max_length=4096)] | None = None
    out: str | None = None  # id.wav
    seed: int | None = None
    speed: float | None = None
    instruct: str | None = None

    @field_validator("out")
    @classmethod
    def _stays_inside(cls, out: str | None) -> str | None:
        if out is not None and not (OUT.fullmatch(out) and Path(out).suffix.lower() in FORMATS):
            raise ValueError(f"a path of plain names inside the output folder, ending in {', '.join(FORMATS)}")
        return out


def speak_lines(
    tts: Synthesizer, lines: BinaryIO, folder: Path, defaults: dict[str, Any], *, size: int | None, force: bool
) -> None:
    """Speak each line into `folder`; what fails is reported in its place, and the rest goes on.

    Args:
        defaults: `Options` for what a line leaves out, the voice as a value.
        size: bytes of `lines`, if known.
        force: make again what is there already.

    Raises:
        CosyqError: of the kind of the first failure, when there was one.
        ReaderGoneError: nobody reads the results any more.
    """
    batch = _Batch(tts, folder, defaults, force)
    counts = {"spoken": 0, "skipped": 0, "failed": 0}
    first: CosyqError | None = None
    with progress_bar("speaking") as progress:
        for number, line, read in _numbered(lines):
            result: dict[str, Any] = {"line": number, "id": None, "ok": True}
            try:
                data = _parsed(line)
                result["id"] = _id(data)
                result |= batch.speak(_checked(data))
                counts["skipped" if result["skipped"] else "spoken"] += 1
            except Exception as error:
                failure = expect(error)
                first = first or failure
                told = {"kind": type(failure).__name__, "message": str(failure), "exit_code": failure.exit_code}
                result |= {"ok": False, "error": told}
                counts["failed"] += 1
            _report(result)
            progress(str(result["id"]), read, size)
    note(", ".join(f"{count} {what}" for what, count in counts.items()))
    if first is not None:
        raise type(first)(f"{counts['failed']} of {sum(counts.values())} lines failed", remedy="see their results")


class _Batch:
    """What the lines of one run share."""

    def __init__(self, tts: Synthesizer, folder: Path, defaults: dict[str, Any], force: bool):
        self._tts, self._folder, self._defaults, self._force = tts, folder, defaults, force
        self._artifact = hashlib.sha256(tts.artifact.manifest.to_json().encode()).hexdigest()
        self._voice: Callable[[str], Voice] = lru_cache(maxsize=16)(tts.voice)
        self._seen: set[str] = set()

    def speak(self, line: Line) -> dict[str, Any]:
        """Returns the line's result."""
        path = self._place(line.out or f"{line.id}.wav")
        speakable(line.text)
        given = {key: value for key in OPTIONS if (value := getattr(line, key)) is not None}
        voice = self._voice(line.voice) if line.voice is not None else self._defaults["voice"]
        options = self._defaults | given | {"voice": voice}
        request, record = self._digest(line.text, options), path.with_name(f"{path.name}.json")
        about = {"id": line.id, "out": str(path)}
        if os.path.lexists(path) and not self._force:
            if _request_of(record) != request:
                raise UsageError("is there already, and not of this line", where=path, remedy="use --force")
            return about | {"skipped": True}
        _prepare(path.parent, record)
        with file_sink(path, self._tts.sample_rate, raw=False) as sink:
            for last in self._tts.utterances(line.text, **options):
                sink.write(last.samples)
        about |= {"skipped": False, "seed": last.seed} | last.timings.to_dict()
        with whole_file(record) as partial:
            partial.write_text(json.dumps({"request": request} | about) + "\n", "utf-8")
        return about

    def _place(self, out: str) -> Path:
        """The file of a line, which no other line of this run has."""
        path = self._folder / out
        if out in self._seen:
            raise UsageError("another line has the same id or output", where=out)
        if len(self._seen) == MAX_LINES:
            raise UsageError(f"more than {MAX_LINES} lines at once", where=out, remedy="give them in parts")
        self._seen.add(out)
        if not path.parent.resolve().is_relative_to(self._folder.resolve()):
            raise UsageError("a link leads out of the output folder", where=path)
        return path

    def _digest(self, text: str, options: dict[str, Any]) -> str:
        """sha256 of all that decides the audio, but for the machine."""
        voice = hashlib.sha256(options["voice"].to_bytes()).hexdigest()
        all_of_it = options | {"voice": voice, "text": text, "artifact": self._artifact}
        return hashlib.sha256(json.dumps(all_of_it, sort_keys=True).encode()).hexdigest()


def _numbered(lines: BinaryIO) -> Iterator[tuple[int, bytes | None, int]]:
    """(line number, line, bytes read); None for a line that is too long, empty lines left out."""
    number = read = 0
    while line := lines.readline(MAX_LINE + 1):
        number += 1
        read += len(line)
        if len(line) > MAX_LINE:
            while line and not line.endswith(b"\n"):
                line = lines.readline(MAX_LINE)
                read += len(line)
            yield number, None, read
        elif line.strip():
            yield number, line, read


def _parsed(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise UsageError(f"more than {MAX_LINE} bytes", where="line")
    try:
        data = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON ({error})", where="line") from None
    if not isinstance(data, dict):
        raise UsageError("a line is a JSON object", where="line")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def _id(data: dict[str, Any]) -> str | None:
    """What the result of an unusable line can still be known by."""
    found = data.get("id")
    return found if isinstance(found, str) and re.fullmatch(NAME, found) else None


def _checked(data: dict[str, Any]) -> Line:
    try:
        return Line.model_validate(data)
    except ValidationError as error:
        problems = " | ".join(_explain(problem) for problem in error.errors()[:MAX_PROBLEMS])
        raise UsageError(problems, where="line") from None


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{key:.50}: unknown key, valid here: {', '.join(Line.model_fields)}"
    if problem["type"] == "missing":
        return f"{key}: missing"
    return f"{key}: {problem['msg'].removeprefix('Value error, ')}, found {problem['input']!r}"[:200]


def _request_of(record: Path) -> str | None:
    """The digest in a record; None for what is no record."""
    try:
        with record.open("rb") as file:
            found = json.loads(file.read(MAX_RECORD))
    except (OSError, ValueError, RecursionError):
        return None
    return found.get("request") if isinstance(found, dict) else None


def _prepare(folder: Path, record: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot be written ({error.strerror})", where=folder) from None


def _report(result: dict[str, Any]) -> None:
    try:
        print(json.dumps(result), flush=True)
    except BrokenPipeError:
        # Python flushes standard output again on its way out; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ReaderGoneError("the reader has gone", where="stdout") from None
