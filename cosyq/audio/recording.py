"""A recording from outside: read with bounded memory, checked, made mono, resampled."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cosyq.errors import UsageError

MIN_SECONDS, MAX_SECONDS = 1.0, 30.0  # the speech tokenizer hears thirty seconds at most
MIN_RATE, MAX_RATE = 8_000, 384_000
MAX_CHANNELS = 8
SILENCE = 1e-3  # peak, of full scale
CLIPPED_SHARE = 0.01  # of samples at full scale
BLOCK = 1 << 16


@dataclass(frozen=True)
class Recording:
    """samples: [n] float32 in -1..1, mono."""

    samples: NDArray[np.float32]
    rate: int

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate

    def at(self, rate: int) -> NDArray[np.float32]:
        """The samples at another rate, [m] float32."""
        if rate == self.rate:
            return self.samples
        import soxr

        return soxr.resample(self.samples, self.rate, rate, quality="VHQ").astype(np.float32)


def read_recording(path: Path, *, longest: float = MAX_SECONDS) -> Recording:
    """Read a wav, flac, mp3 or ogg file of speech.

    No more than `longest` seconds are ever decoded, whatever the header claims.

    Raises:
        UsageError: it is no audio, too short, too long, silent or clipped.
    """
    import soundfile

    if not os.path.isfile(path):  # unlike the path's own method, quiet about names that no file can have
        raise UsageError("no such audio file", where=path)
    try:
        with soundfile.SoundFile(path) as file:
            rate, channels = file.samplerate, file.channels
            if not MIN_RATE <= rate <= MAX_RATE or not 1 <= channels <= MAX_CHANNELS:
                raise UsageError(f"{channels} channels at {rate} Hz are no recording of speech", where=path)
            limit = int(longest * rate)
            # Mixed down block by block: a header that claims eight channels must not cost eight times the memory.
            blocks = file.blocks(BLOCK, frames=limit + 1, dtype="float32", always_2d=True)
            samples = np.concatenate([np.empty(0, np.float32), *(block.mean(axis=1) for block in blocks)])
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a .raw file, which has no header
        reason = getattr(error, "error_string", error)
        remedy = "wav, flac, mp3 and ogg are read; make one with `ffmpeg -i FILE out.wav`"
        raise UsageError(f"not readable as audio ({reason})", where=path, remedy=remedy) from None
    if len(samples) > limit:
        raise UsageError(f"longer than {longest:g} seconds", where=path, remedy="cut out a clean passage")
    _check_speech(samples, rate, path)
    return Recording(samples, rate)


def _check_speech(samples: NDArray[np.float32], rate: int, path: Path) -> None:
    if len(samples) < MIN_SECONDS * rate:
        raise UsageError(f"only {len(samples) / rate:.2f} seconds long", where=path, remedy="record at least one")
    if not np.isfinite(samples).all():
        raise UsageError("holds samples that are not finite", where=path)
    loudness = np.abs(samples)
    if loudness.max() < SILENCE:
        raise UsageError("is silent", where=path)
    if (loudness > 0.999).mean() > CLIPPED_SHARE:
        raise UsageError("is clipped", where=path, remedy="record it again at a lower level")
