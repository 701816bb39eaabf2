"""Samples on their way from a device."""

import pytest
import torch

from cosyq.errors import DeviceError
from cosyq.runtime.sound import Sound


def test_samples_are_what_was_made():
    wav = torch.arange(5.0)
    sound = Sound(wav, torch.zeros(80, 3).T)
    assert len(sound) == 5
    assert sound.ready
    assert torch.equal(sound.samples(), wav)
    assert len(Sound(wav[:0], torch.ones(80, 1)).samples()) == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_mel_or_samples_that_are_not_finite_are_told_apart(value):
    wav, mel = torch.zeros(5), torch.zeros(80, 3)
    mel[79, 2] = value
    with pytest.raises(DeviceError, match="mel"):
        Sound(wav, mel).samples()
    wav[4] = value
    with pytest.raises(DeviceError, match="samples"):
        Sound(wav, torch.zeros(80, 3)).samples()
