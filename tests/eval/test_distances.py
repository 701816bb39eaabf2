"""Distances against hand-computed values and against scipy- or numpy-free formulas written out here."""

import math

import numpy as np
import pytest
import torch

from cosyq.eval.distances import (
    agreement,
    divergence,
    log_spectral,
    mel_cepstral,
    outcomes,
    stft_distance,
    surprise,
)

DB = 20 / math.log(10)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the language model


def test_all_ids_above_the_vocabulary_are_one_outcome():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.1, 0.3], [0.1, 0.2, 0.3, 0.1, 0.3]]).log()
    found = outcomes(logits, 3, minimum=1).exp()
    assert found[1].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4], rel=1e-6)
    assert found[0].tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 2, 0], rel=1e-6)  # it may not end yet
    assert found.dtype == torch.float64


def test_divergence_by_hand():
    reference = outcomes(torch.tensor([[1.0, 1.0, 2.0], [1.0, 1.0, 2.0]]).log(), 2, minimum=1)
    found = outcomes(torch.tensor([[3.0, 1.0, 9.0], [3.0, 1.0, 4.0]]).log(), 2, minimum=1)
    first = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)  # without the end
    second = 0.25 * math.log(0.25 / 0.375) + 0.25 * math.log(0.25 / 0.125) + 0.5 * math.log(0.5 / 0.5)
    assert divergence(reference, found).tolist() == pytest.approx([first, second], rel=1e-6)
    assert agreement(reference, found).tolist() == [True, True]  # the first of two that are as likely
    assert surprise(found, torch.tensor([1, 2])).tolist() == pytest.approx([-math.log(0.25), -math.log(0.5)], rel=1e-6)


def test_divergence_is_zero_of_itself_and_positive_of_others():
    one = outcomes(10 * normal(50, 300), 280, minimum=20)
    other = outcomes(10 * normal(50, 300, seed=1), 280, minimum=20)
    assert divergence(one, one).abs().max() == 0
    assert divergence(one, other).min() > 0
    assert agreement(one, one).all()
    assert not agreement(one, other).all()


def test_divergence_of_what_is_all_but_impossible_is_finite():
    one, other = (outcomes(torch.tensor([row]), 2, minimum=0) for row in ([2000.0, 0.0, 0.0], [0.0, 2000.0, 0.0]))
    assert divergence(one, other).tolist() == [2000]


# ---- mels


def test_a_level_that_is_off_everywhere():
    mel = normal(80, 7)
    assert log_spectral(mel, mel + math.log(2)).tolist() == pytest.approx([20 * math.log10(2)] * 7, rel=1e-5)
    assert mel_cepstral(mel, mel + math.log(2)).abs().max() < 1e-5  # loudness is not in it


def test_log_spectral_distance_as_written():
    one, other = normal(80, 5).numpy(), normal(80, 5, seed=1).numpy()
    expected = np.sqrt(np.mean((20 * np.log10(np.exp(one.astype(float)) / np.exp(other.astype(float)))) ** 2, axis=0))
    assert log_spectral(torch.from_numpy(one), torch.from_numpy(other)).numpy() == pytest.approx(expected)


def test_mel_cepstral_distance_as_written():
    """(10 / ln 10) sqrt(2 sum (c - c')^2), where the log magnitude is the sum of c_m cos(m w)."""
    one, other = normal(80, 5).double(), normal(80, 5, seed=1).double()
    w = (np.arange(80) + 0.5) * np.pi / 80

    def cepstrum(mel):
        return np.stack([2 / 80 * (mel.numpy() * np.cos(m * w)[:, None]).sum(0) for m in range(1, 14)])

    expected = 10 / np.log(10) * np.sqrt(2 * ((cepstrum(one) - cepstrum(other)) ** 2).sum(0))
    assert mel_cepstral(one, other).numpy() == pytest.approx(expected)


@pytest.mark.parametrize(("order", "heard"), [(1, True), (13, True), (14, False)])
def test_a_ripple_of_the_envelope_counts_up_to_the_last_coefficient(order, heard):
    ripple = torch.cos(order * (torch.arange(80) + 0.5) * math.pi / 80)[:, None]
    expected = DB / math.sqrt(2)  # the RMS of a cosine, in dB
    assert log_spectral(torch.zeros(80, 1), ripple).item() == pytest.approx(expected, rel=1e-5)
    found = mel_cepstral(torch.zeros(80, 1), ripple).item()
    assert found == pytest.approx(expected if heard else 0, rel=1e-5, abs=1e-5)


# ---- sound


def test_a_sound_at_half_its_level():
    """Convergence 1/2 and ln 2 at every resolution, but for bins under the floor."""
    samples = normal(24_000)
    assert stft_distance(samples, samples / 2) == pytest.approx(0.5 + math.log(2), rel=1e-3)
    assert stft_distance(samples, samples.clone()) == 0


def test_stft_distance_as_written():
    reference, found = normal(5000).numpy().astype(float), normal(5000, seed=1).numpy().astype(float)
    terms = []
    for fft, hop, length in ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240)):
        window = np.zeros(fft)
        begin = (fft - length) // 2
        window[begin : begin + length] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)

        def magnitude(samples, fft=fft, hop=hop, window=window):
            padded = np.pad(samples, fft // 2)
            frames = [padded[i : i + fft] * window for i in range(0, len(padded) - fft + 1, hop)]
            return np.sqrt(np.maximum(np.abs(np.fft.rfft(frames)) ** 2, 1e-7))

        one, other = magnitude(reference), magnitude(found)
        terms.append(np.linalg.norm(one - other) / np.linalg.norm(one) + np.abs(np.log(one) - np.log(other)).mean())
    assert stft_distance(torch.from_numpy(reference), torch.from_numpy(found)) == pytest.approx(np.mean(terms))


def test_what_cannot_be_heard_is_no_distance():
    assert stft_distance(torch.zeros(960), 1e-7 * normal(960)) == 0  # and 40 ms are enough


def test_more_noise_is_further():
    samples, noise = normal(12_000), normal(12_000, seed=1)
    found = [stft_distance(samples, samples + level * noise) for level in (0.01, 0.1, 1.0)]
    assert found == sorted(found)
    assert 0 < found[0] < 0.1
