import io
import wave

import numpy as np
import pytest
import soundfile

from cosyq.audio.sinks import PipeSink, file_sink, to_s16, wav_header
from cosyq.errors import UsageError


def test_samples_are_rounded_and_never_wrap():
    samples = np.array([0, 1, -1, 0.5, -0.5, 2, -2, 1e-5], dtype=np.float32)
    assert np.frombuffer(to_s16(samples), "<i2").tolist() == [0, 32767, -32767, 16384, -16384, 32767, -32768, 0]


def test_a_header_of_known_length_is_a_wav():
    with wave.open(io.BytesIO(wav_header(24000, 3) + b"\0" * 6)) as file:
        assert (file.getnframes(), file.getframerate(), file.getnchannels(), file.getsampwidth()) == (3, 24000, 1, 2)


def test_a_piped_wav_of_open_length_is_read_to_its_end():
    pipe = io.BytesIO()
    sink = PipeSink(pipe, 24000, raw=False)
    for _ in range(3):
        sink.write(np.full(100, 0.25, np.float32))
    samples, rate = soundfile.read(io.BytesIO(pipe.getvalue()), dtype="int16")
    assert (len(samples), rate, set(samples.tolist())) == (300, 24000, {8192})


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3", ".WAV"])
def test_files_appear_when_they_are_complete(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    tone = np.sin(np.arange(24000) * 0.05).astype(np.float32) * 0.5
    with file_sink(path, 24000, raw=False) as sink:
        sink.write(tone[:10_000])
        assert not path.exists()
        sink.write(tone[10_000:])
    found, rate = soundfile.read(path, dtype="float32")
    assert rate == 24000
    assert abs(len(found) - 24000) <= (2400 if suffix == ".mp3" else 0)
    if suffix in (".wav", ".flac"):
        assert np.abs(found * 32768 / 32767 - tone).max() < 1e-4
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_old_file_survives_a_failure(tmp_path):
    path = tmp_path / "x.wav"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), file_sink(path, 24000, raw=False) as sink:
        sink.write("no samples")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.wav"]


def test_unknown_kinds_are_refused(tmp_path):
    for name in ("x", "x.aiff", "x.wav.txt"):
        with (
            pytest.raises(UsageError, match=r"use \.wav, \.flac, \.ogg, \.mp3, or --raw"),
            file_sink(tmp_path / name, 24000, raw=False),
        ):
            pass
    with file_sink(tmp_path / "x", 24000, raw=True) as sink:
        sink.write(np.zeros(5, np.float32))
    assert (tmp_path / "x").read_bytes() == b"\0" * 10
