"""Where samples go: a file that appears when it is complete, or a pipe that gets them as they come."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from cosyq.errors import ArtifactError, ReaderGoneError, UsageError
from cosyq.files import whole_file

FORMATS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG", ".mp3": "MP3"}
OPEN_LENGTH = 0xFFFFFFFF  # what a streamed wav header says in place of a size


class Sink(Protocol):
    def write(self, samples: NDArray[np.float32]) -> None:
        """Append mono samples, [n] float32 in -1..1."""


def to_s16(samples: NDArray[np.float32]) -> bytes:
    """[n] float32 in -1..1 -> little-endian 16-bit PCM, rounded, never wrapped."""
    return np.clip(np.rint(samples * 32767), -32768, 32767).astype("<i2").tobytes()


def wav_header(sample_rate: int, samples: int | None = None) -> bytes:
    """44 bytes of mono 16-bit RIFF; without a count the length is left open, as streams do."""
    data = OPEN_LENGTH if samples is None else 2 * samples
    riff = OPEN_LENGTH if samples is None else 36 + data
    parts = (b"RIFF", riff, b"WAVE", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16, b"data", data)
    return struct.pack("<4sI4s4sIHHIIHH4sI", *parts)


def flac(samples: NDArray[np.float32], sample_rate: int) -> bytes:
    """A whole FLAC file of mono samples, [n] float32 in -1..1, in the 16 bits that any file of ours has."""
    import soundfile

    held = BytesIO()
    soundfile.write(held, np.frombuffer(to_s16(samples), "<i2"), sample_rate, format="FLAC", subtype="PCM_16")
    return held.getvalue()


class PipeSink:
    """Raw s16le, or a wav of open length, to a pipe.

    Raises:
        ReaderGoneError: the pipe was closed at the other end.
    """

    def __init__(self, pipe: BinaryIO, sample_rate: int, *, raw: bool):
        self._pipe = pipe
        if not raw:
            self._put(wav_header(sample_rate))

    def write(self, samples: NDArray[np.float32]) -> None:
        self._put(to_s16(samples))

    def _put(self, data: bytes) -> None:
        try:
            self._pipe.write(data)
            self._pipe.flush()
        except BrokenPipeError:
            # Python flushes standard output again on its way out; let that go nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._pipe.fileno())
            raise ReaderGoneError("the reader has gone", where="stdout") from None


class _RawFile:
    def __init__(self, file: BinaryIO):
        self._file = file

    def write(self, samples: NDArray[np.float32]) -> None:
        self._file.write(to_s16(samples))


class _SoundFile:
    def __init__(self, path: Path, sample_rate: int, container: str):
        import soundfile

        self._pcm = container in ("WAV", "FLAC")
        subtype = "PCM_16" if self._pcm else None
        self._file = soundfile.SoundFile(path, "w", sample_rate, 1, subtype, format=container)

    def write(self, samples: NDArray[np.float32]) -> None:
        # The same 16 bits in a file as in a pipe: libsndfile would scale by 32768.
        self._file.write(np.frombuffer(to_s16(samples), "<i2") if self._pcm else samples)

    def close(self) -> None:
        self._file.close()


def check_suffix(path: Path, *, raw: bool) -> None:
    """Raises UsageError for a file name whose format cannot be written."""
    if not raw and path.suffix.lower() not in FORMATS:
        kind = path.suffix or "a file without suffix"
        raise UsageError(f"cannot write {kind}", where=path, remedy=f"use {', '.join(FORMATS)}, or --raw")
    if not path.parent.is_dir():
        raise UsageError("no such folder", where=path.parent)


@contextmanager
def file_sink(path: Path, sample_rate: int, *, raw: bool) -> Iterator[Sink]:
    """A sink into a file that appears when the block ends well.

    Raises:
        UsageError: the suffix is unknown or the folder is missing.
        ArtifactError: the file cannot be written.
    """
    check_suffix(path, raw=raw)
    with whole_file(path) as partial:
        if raw:
            with partial.open("wb") as file:
                yield _RawFile(file)
        else:
            import soundfile

            try:
                with closing(_SoundFile(partial, sample_rate, FORMATS[path.suffix.lower()])) as sound:
                    yield sound
            except soundfile.SoundFileError as error:
                raise ArtifactError(f"cannot be written ({error})", where=path) from None
