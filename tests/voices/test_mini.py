"""Enrolment with cosyq-mini's own encoders: the code and the interfaces are the published ones'."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN

from cosyq.audio.recording import Recording, read_recording
from cosyq.checkpoint.reader import open_checkpoint
from cosyq.recipe import bundled_checkpoint
from cosyq.voices.enrol import Encoders, enrol

AUDIO = GOLDEN.parent / "audio"


@pytest.fixture(scope="module")
def encoders():
    return Encoders(bundled_checkpoint("mini"))


@pytest.fixture(scope="module")
def flow():
    return open_checkpoint(bundled_checkpoint("mini")).config.flow


@pytest.mark.parametrize(("name", "seconds"), [("zero_shot_prompt", 3.48), ("cross_lingual_prompt", 13.75)])
def test_a_recording_becomes_a_voice(encoders, flow, name, seconds):
    recording = read_recording(AUDIO / f"{name}.wav")
    voice = enrol("me", recording, "", encoders, flow)
    tokens = voice.prompt_tokens
    heard = math.ceil(math.ceil(int(seconds * 100) / 2) / 2)  # of the Whisper mel, by two halvings rounded up
    assert len(tokens) == min(heard, int(seconds * 50) // 2), "and as many as there are pairs of frames"
    assert voice.prompt_mel.shape == (2 * len(tokens), 80)
    assert 0 <= tokens.min() <= tokens.max() < 6561
    assert tokens.unique().numel() > len(tokens) / 3
    assert voice.speaker.shape == (192,)


def test_loudness_says_little_and_pitch_much(encoders, flow):
    original = read_recording(AUDIO / "zero_shot_prompt.wav")
    quiet = Recording(original.samples * 0.5, original.rate)
    lower = Recording(original.samples, round(original.rate * 0.8))  # played more slowly
    vectors = [F.normalize(enrol("me", take, "", encoders, flow).speaker, dim=-1) for take in (original, quiet, lower)]
    quieter, deeper = (1 - torch.dot(vectors[0], other) for other in vectors[1:])
    assert quieter < 0.01
    assert deeper > 0.1
