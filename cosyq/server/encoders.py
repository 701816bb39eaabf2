"""Samples into bytes for the wire, as they come: six formats, and the speeds that an engine does not have.

One encoder a response. What it has taken in and not yet given out comes with `finish`. wav and pcm are written here;
the others, and what is stretched, by `server.compressed`, whose library may be missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from cosyq.audio.sinks import to_s16, wav_header
from cosyq.errors import UsageError

Format = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]
Samples = NDArray[np.float32]


class Encoder(Protocol):
    """`light` ones take less time than a thread would to hear of it."""

    light: bool

    def encode(self, samples: Samples) -> bytes:
        """The next samples, [n] float32 in -1..1 -> what can be sent by now, possibly nothing."""

    def finish(self) -> bytes:
        """What was held back, and the format's end."""


@dataclass(frozen=True)
class Wire:
    """A format as it is sent.

    rate: of its samples; None is the speaker's own. MP3 and AAC streams cannot say how much of their start is the
    encoder's delay, 1,105 and 1,024 samples: at 48 kHz that is 23 and 21 ms that play as silence, at 24 kHz twice that.
    """

    media_type: str
    container: str = ""
    codec: str = ""
    rate: int | None = None
    bit_rate: int | None = None
    options: tuple[tuple[str, str], ...] = ()


WIRES: dict[Format, Wire] = {
    "mp3": Wire("audio/mpeg", "mp3", "libmp3lame", 48_000, 96_000, (("write_xing", "0"),)),
    # A page every 0.2 s: the default of one second would hold back the first audio.
    "opus": Wire("audio/ogg", "ogg", "libopus", None, 48_000, (("page_duration", "200000"),)),
    "aac": Wire("audio/aac", "adts", "aac", 48_000, 96_000),
    "flac": Wire("audio/flac", "flac", "flac"),
    "wav": Wire("audio/wav"),
    "pcm": Wire("audio/pcm"),
}


def make_encoder(format: Format, sample_rate: int, tempo: float = 1.0) -> Encoder:
    """An encoder of mono samples. `tempo` stretches time behind the engine's own speed, pitch stays; 0.5 to 2.

    Raises:
        UsageError: it takes PyAV, which is not here.
    """
    wire = WIRES[format]
    if not wire.codec and tempo == 1.0:
        return _Plain(format, sample_rate)
    if (compressed := _compressed()) is None:
        what = f"{format} at this speed" if tempo != 1.0 else format
        raise UsageError(f"this server has no PyAV for {what}", remedy="ask for wav or pcm at a speed of 0.5 to 2")
    encoder: Encoder = compressed.Compressed(wire, sample_rate) if wire.codec else _Plain(format, sample_rate)
    return encoder if tempo == 1.0 else compressed.Stretched(encoder, sample_rate, tempo)


def prepare() -> None:
    """Read what no request should wait for."""
    _compressed()


def _compressed() -> ModuleType | None:
    try:
        from cosyq.server import compressed
    except ModuleNotFoundError as error:
        if error.name != "av":
            raise
        return None
    return compressed


class _Plain:
    """s16le, after a header or none."""

    light = True

    def __init__(self, format: Format, sample_rate: int):
        self._header = wav_header(sample_rate) if format == "wav" else b""

    def encode(self, samples: Samples) -> bytes:
        header, self._header = self._header, b""
        return header + to_s16(samples)

    def finish(self) -> bytes:
        return self._header
