"""What a page draws, as numbers for its SVG: intervals beside the claim, modules' errors; and sound as a picture."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cosyq.audio.features import MEL_FFT, flow_mel
from cosyq.eval.metric import Finding

WIDTH = 200.0  # of an interval's bar; zero is in its middle
HEIGHT = 120  # pixels of an error's axis
NARROW, WIDE, TOTAL = 3, 12, 1_100  # pixels of a module's column with its gap, and of all of them if they fit
SMALLEST = 1e-5  # relative error below which a column does not tell
RANGE = 8.0  # nepers, about 70 dB, from the loudest to white
LONGEST = 1_500  # frames of a picture, thirty seconds


@dataclass(frozen=True)
class Bar:
    """x of an interval's ends, its value and the ends of the claim, in 0..WIDTH."""

    low: float
    high: float
    value: float
    claim: tuple[float, float]


def bar(finding: Finding) -> Bar | None:
    """The difference beside zero and the claim, on a scale of its own; None where it is not finite."""
    found, claim = finding.difference, finding.metric.claim
    reach = 1.1 * max(abs(found.low), abs(found.high), abs(found.value), 1.5 * claim)
    if not math.isfinite(reach):
        return None

    def place(difference: float) -> float:
        return round(WIDTH / 2 * (1 + difference / reach), 2)

    return Bar(place(found.low), place(found.high), place(found.value), (place(-claim), place(claim)))


@dataclass(frozen=True)
class Column:
    """One module: x, y and height of its column in pixels; y grows downwards."""

    name: str
    format: str
    bytes: int
    error: float
    x: int
    y: float
    height: float


@dataclass(frozen=True)
class Chart:
    """The modules of a stage in the model's order, and the lines of its logarithmic axis as (y, percent)."""

    stage: str
    columns: tuple[Column, ...]
    step: int
    lines: tuple[tuple[float, str], ...]

    @property
    def width(self) -> int:
        return self.step * len(self.columns)

    @property
    def flat(self) -> bool:
        """Nothing to draw: no module of it lost anything."""
        return not any(column.error for column in self.columns)


def charts(modules: Sequence[tuple[str, str, int, float]]) -> list[Chart]:
    """A chart a stage, all with one axis. A module without error has a column without height."""
    errors = [_drawn(error) for *_, error in modules]
    bottom = math.floor(math.log10(min((error for error in errors if error), default=SMALLEST)))
    top = max(math.ceil(math.log10(max(errors, default=1) or 1)), bottom + 1)

    def height(error: float) -> float:
        return round(HEIGHT * (math.log10(_drawn(error)) - bottom) / (top - bottom), 1) if _drawn(error) else 0.0

    lines = tuple((HEIGHT - height(10.0**decade), f"{10.0 ** (decade + 2):g} %") for decade in range(bottom, top + 1))
    stages: dict[str, list[tuple[str, str, int, float]]] = {}
    for module in modules:
        stages.setdefault(module[0].partition(".")[0], []).append(module)
    found = []
    for stage, members in stages.items():
        step = min(max(TOTAL // len(members), NARROW), WIDE)
        columns = [
            Column(*member, x=step * place, y=round(HEIGHT - height(member[3]), 1), height=height(member[3]))
            for place, member in enumerate(members)
        ]
        found.append(Chart(stage, tuple(columns), step, lines))
    return found


def _drawn(error: float) -> float:
    """What is not finite, or above everything, stands at the top."""
    if not math.isfinite(error) or error > 10:
        return 10.0
    return max(error, SMALLEST) if error > 0 else 0.0


def spectrograms(sounds: Iterable[NDArray[np.float32] | None]) -> list[bytes | None]:
    """PNGs [80 bins, frames] of [n] float32 samples at 24 kHz: as dark as loud, one scale and one width for all.

    The picture is of the flow's own mel, 50 frames a second, low bins at the bottom.
    """
    mels = [None if sound is None or not len(sound) else _mel(sound) for sound in sounds]
    there = [mel for mel in mels if mel is not None]
    if not there:
        return [None for _ in mels]
    width, loudest = max(len(mel) for mel in there), max(float(mel.max()) for mel in there)
    return [None if mel is None else png(_shades(mel, width, loudest)) for mel in mels]


def _mel(sound: NDArray[np.float32]) -> NDArray[np.float32]:
    padded = np.pad(np.nan_to_num(sound), (0, max(0, MEL_FFT - len(sound))))
    return flow_mel(torch.from_numpy(padded))[:LONGEST].numpy()


def _shades(mel: NDArray[np.float32], width: int, loudest: float) -> NDArray[np.uint8]:
    light = np.clip((loudest - mel.T[::-1]) / RANGE, 0, 1)
    return np.pad(np.rint(255 * light), ((0, 0), (0, width - len(mel))), constant_values=255).astype(np.uint8)


def png(grey: NDArray[np.uint8]) -> bytes:
    """[height, width] uint8 -> an 8-bit greyscale PNG (ISO/IEC 15948), rows unfiltered but for the difference above."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = grey.shape
    above = np.diff(grey, axis=0, prepend=np.zeros((1, width), np.uint8))  # uint8 wraps, as the filter does
    rows = np.insert(above, 0, 2, axis=1)  # filter 2, "up"
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
