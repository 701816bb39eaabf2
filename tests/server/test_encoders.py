"""Formats and speeds: what goes in comes out, whole, as it is made."""

import subprocess
import sys

import numpy as np
import pytest
from serving import RATE, decoded, seconds_of, tone

from cosyq.audio.sinks import OPEN_LENGTH, to_s16
from cosyq.errors import UsageError
from cosyq.server.encoders import WIRES, make_encoder, prepare

FORMATS = list(WIRES)
SECONDS = 2.311


def encoded(format, samples, tempo=1.0, step=7000):
    encoder = make_encoder(format, RATE, tempo)
    parts = [encoder.encode(samples[i : i + step]) for i in range(0, len(samples), step)]
    return [*parts, encoder.finish()]


@pytest.mark.parametrize("tempo", [0.5, 0.77, 1.0, 2.0])
@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_lost_and_little_is_added(format, tempo):
    """MP3 and AAC begin with their encoder's delay and end in a whole frame; the others are exact."""
    data = b"".join(encoded(format, tone(SECONDS).samples, tempo))
    assert seconds_of(data, format) == pytest.approx(SECONDS / tempo, abs=0.05 if format in ("mp3", "aac") else 1e-4)
    samples, rate = decoded(data, format)
    middle = samples[len(samples) // 4 : -len(samples) // 4]
    assert 0.25 < np.sqrt((middle**2).mean()) < 0.45  # of a tone of amplitude 0.5: 0.35
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert spectrum.argmax() * rate / len(middle) == pytest.approx(440, abs=5)  # and the pitch stays


@pytest.mark.parametrize("format", FORMATS)
def test_audio_is_given_out_before_the_last_of_it_came(format):
    parts = encoded(format, tone(4.0).samples)
    early = b"".join(parts[:7])  # two of the four seconds
    assert seconds_of(early, format) > 1.4


@pytest.mark.parametrize("format", FORMATS)
def test_the_cuts_do_not_show(format):
    samples = tone(1.5).samples
    one, other = (decoded(b"".join(encoded(format, samples, step=step)), format)[0] for step in (960, 36_000))
    np.testing.assert_allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("format", ["pcm", "wav", "flac"])
def test_lossless_formats_hold_the_samples_of_a_file(format):
    samples = np.random.default_rng(0).uniform(-1.2, 1.2, 5000).astype(np.float32)
    found, _ = decoded(b"".join(encoded(format, samples)), format)
    assert np.array_equal(np.rint(found * 32768).astype("<i2"), np.frombuffer(to_s16(samples), "<i2"))


def test_a_wav_header_comes_once_and_leaves_the_length_open():
    data = b"".join(encoded("wav", tone(1.0).samples))
    assert data[:4] == b"RIFF"
    assert int.from_bytes(data[40:44], "little") == OPEN_LENGTH
    assert len(data) == 44 + 2 * RATE


@pytest.mark.parametrize("format", FORMATS)
def test_the_shortest_audio_still_is_a_file(format):
    """Two speech tokens at twice the speed, less than a window of atempo: the header and all come at the end."""
    assert 0 < seconds_of(b"".join(encoded(format, tone(0.04).samples, tempo=2.0)), format) < 0.07


def test_wav_and_pcm_need_no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.delitem(sys.modules, "cosyq.server.compressed", raising=False)
    monkeypatch.delattr("cosyq.server.compressed", raising=False)
    prepare()
    data = to_s16(tone(1.0).samples)
    assert b"".join(encoded("pcm", tone(1.0).samples)) == data
    assert b"".join(encoded("wav", tone(1.0).samples)).endswith(data)
    with pytest.raises(UsageError, match="no PyAV for mp3; ask for wav or pcm"):
        make_encoder("mp3", RATE)
    with pytest.raises(UsageError, match=r"no PyAV for pcm at this speed; .* 0\.5 to 2"):
        make_encoder("pcm", RATE, 0.5)


def test_a_server_is_read_without_the_library():
    code = "import sys; sys.modules['av'] = None; import cosyq.server.run"
    subprocess.run([sys.executable, "-c", code], check=True)
