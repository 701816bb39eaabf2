"""Features against the values of the libraries that define them, on a second of speech.

The golden file was computed with openai-whisper's filters and STFT, torchaudio's Kaldi fbank and librosa's mel
filters under Matcha-TTS' recipe.
"""

import pytest
from conftest import GOLDEN, relative
from safetensors.torch import load_file

from cosyq.audio.features import flow_mel, kaldi_fbank, whisper_log_mel


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDEN.parent / "features.safetensors")


def test_whisper_log_mel(expected):
    assert relative(whisper_log_mel(expected["audio_16k"]), expected["whisper_log_mel_128"]) < 1e-5


def test_matcha_mel(expected):
    assert relative(flow_mel(expected["audio_24k"]).T, expected["matcha_mel_80"]) < 1e-5


def test_kaldi_fbank(expected):
    # Two implementations of Kaldi's, float32 throughout; the log of near-silent bins differs most.
    assert relative(kaldi_fbank(expected["audio_16k"]), expected["kaldi_fbank_80"]) < 5e-4
