"""Encoders that ffmpeg's libraries are, by PyAV: codecs, and another tempo at the same pitch."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.filter import Graph
from numpy.typing import NDArray

from cosyq.audio.sinks import to_s16
from cosyq.server.encoders import Encoder, Samples, Wire


class _Pipe:
    """What PyAV writes to. It has no `seek`, so that muxers write what a stream can have."""

    def __init__(self) -> None:
        self._data = bytearray()

    def write(self, data: bytes) -> int:
        self._data += data
        return len(data)

    def take(self) -> bytes:
        data = bytes(self._data)
        self._data.clear()
        return data


class Compressed:
    """A codec in its container."""

    light = False

    def __init__(self, wire: Wire, sample_rate: int):
        self._pipe, self._rate, self._position = _Pipe(), sample_rate, 0
        options = {"flush_packets": "1", **dict(wire.options)}
        self._container: Any = av.open(self._pipe, "w", format=wire.container, options=options)
        stream: Any = self._container.add_stream(wire.codec, rate=wire.rate or sample_rate, layout="mono")
        if wire.bit_rate:
            stream.bit_rate = wire.bit_rate
        self._stream = stream

    def encode(self, samples: Samples) -> bytes:
        if len(samples):
            data = np.frombuffer(to_s16(samples), "<i2")
            self._mux(_frame(data, "s16", self._rate, self._position))
            self._position += len(samples)
        return self._pipe.take()

    def finish(self) -> bytes:
        self._mux(None)
        self._container.close()
        return self._pipe.take()

    def _mux(self, frame: av.AudioFrame | None) -> None:
        for packet in self._stream.encode(frame):
            self._container.mux(packet)


class Stretched:
    """ffmpeg's atempo before an encoder. It works in windows and ends up to 25 ms off, which is put right here."""

    light = False

    def __init__(self, encoder: Encoder, sample_rate: int, tempo: float):
        self._encoder, self._rate, self._tempo = encoder, sample_rate, tempo
        self._position = self._given = 0  # samples in and out
        graph = Graph()
        source = graph.add_abuffer(
            sample_rate=sample_rate, format="flt", layout="mono", time_base=Fraction(1, sample_rate)
        )
        graph.link_nodes(source, graph.add("atempo", str(tempo)), graph.add("abuffersink")).configure()
        self._graph = graph

    def encode(self, samples: Samples) -> bytes:
        if len(samples):
            self._graph.push(_frame(samples, "flt", self._rate, self._position))
            self._position += len(samples)
        stretched = self._pull()
        self._given += len(stretched)
        return self._encoder.encode(stretched)

    def finish(self) -> bytes:
        self._graph.push(None)
        rest, wanted = self._pull(), max(round(self._position / self._tempo) - self._given, 0)
        exact = np.pad(rest[:wanted], (0, max(wanted - len(rest), 0)))
        return self._encoder.encode(exact) + self._encoder.finish()

    def _pull(self) -> Samples:
        """What the filter has ready, [n] float32."""
        frames = [np.empty(0, np.float32)]
        while True:
            try:
                frame: Any = self._graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return np.concatenate(frames)
            frames.append(frame.to_ndarray()[0])


def _frame(data: NDArray[Any], format: str, rate: int, position: int) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(data)[None], format=format, layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = rate, position, Fraction(1, rate)
    return frame
