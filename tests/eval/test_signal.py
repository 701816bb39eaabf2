"""Clicks and pauses of waves whose clicks and pauses are known."""

import numpy as np
import pytest

from cosyq.eval.signal import clicks, pauses

RATE = 24_000


def voiced(seconds, rate=RATE, pitch=110.0):
    """Pulses through two resonances with a little breath: as spiky as a voice's second difference gets."""
    count, rng = int(seconds * rate), np.random.default_rng(0)
    pulses = np.zeros(count)
    pulses[(np.arange(0, seconds * 0.999, 1 / pitch) * rate).astype(int)] = 1
    excitation = pulses + 0.003 * rng.standard_normal(count)
    for frequency, width in ((700, 90), (1800, 120)):
        radius, angle = np.exp(-np.pi * width / rate), 2 * np.pi * frequency / rate
        response = radius ** np.arange(2000) * np.sin(angle * np.arange(1, 2001)) / np.sin(angle)
        excitation = np.convolve(excitation, response)[:count]
    return (0.3 * excitation / np.abs(excitation).max()).astype(np.float32)


@pytest.mark.parametrize("pitch", [70, 110, 220, 400])
def test_a_voice_has_no_clicks(pitch):
    assert clicks(voiced(2.0, pitch=pitch), RATE) == 0


def test_noise_and_silence_have_no_clicks():
    noise = 0.1 * np.random.default_rng(0).standard_normal(2 * RATE).astype(np.float32)
    assert clicks(noise, RATE) == 0
    assert clicks(np.zeros(RATE, np.float32), RATE) == 0
    assert clicks(np.zeros(2, np.float32), RATE) == clicks(np.zeros(0, np.float32), RATE) == 0


@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_clicks_are_counted(rate):
    wave = voiced(2.0, rate)
    places = (np.array([0.31, 0.9023, 1.4]) * rate).astype(int)
    for number, place in enumerate(places, 1):
        wave[place] += 0.5
        assert clicks(wave, rate) == number


def test_a_seam_is_a_click():
    wave = voiced(2.0)
    wave[RATE:] += np.float32(0.3) * np.linspace(1, 0, RATE, dtype=np.float32)
    assert clicks(wave, RATE) == 1


def test_a_click_in_silence_has_to_be_audible():
    silence = np.zeros(RATE, np.float32)
    silence[RATE // 2] = 1e-4
    assert clicks(silence, RATE) == 0
    silence[RATE // 2] = 1e-2
    assert clicks(silence, RATE) == 1


@pytest.mark.parametrize("seconds", [0.1, 0.25, 0.737])
def test_a_pause_is_measured_to_ten_milliseconds(seconds):
    wave, quiet = voiced(1.0), np.zeros(round(seconds * RATE), np.float32)
    edges = np.zeros(7777, np.float32)  # before the first sound and after the last: no pause
    silent, span = pauses(np.concatenate([edges, wave[:11_111], quiet, wave[11_111:], edges]), RATE)
    assert silent == pytest.approx(seconds, abs=0.01)
    assert span == pytest.approx(1.0 + seconds, abs=0.01)


def test_loudness_does_not_matter_and_faint_hiss_is_silence():
    wave = voiced(1.0)
    hiss = 1e-4 * np.random.default_rng(0).standard_normal(RATE // 2).astype(np.float32)
    loud = pauses(np.concatenate([wave, hiss, wave]), RATE)
    assert loud[0] == pytest.approx(0.5, abs=0.01)
    assert pauses(np.concatenate([wave, hiss, wave]) * np.float32(0.5), RATE) == loud


def test_without_a_sound_there_is_no_span():
    assert pauses(np.zeros(RATE, np.float32), RATE) == (0.0, 0.0)
    assert pauses(np.zeros(0, np.float32), RATE) == (0.0, 0.0)
