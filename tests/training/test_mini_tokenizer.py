"""The speech tokenizer uses its codes, and is the same outside training whoever stands beside whom in a batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the training code is not part of the package

from training.mini.networks.tokenizer import SpeechTokenizer, Spread, correlation


def test_every_level_is_used_whatever_comes():
    """Channels that differ a thousandfold in size and place all reach their three levels."""
    torch.manual_seed(0)
    spread = Spread(8)
    x = torch.randn(4, 500, 8) * torch.logspace(-1, 2, 8) + torch.linspace(-100, 100, 8)
    mask = torch.ones(4, 500, 1)
    levels = torch.tanh(1.0986 * spread(x, mask)).round()
    for level in (-1, 0, 1):
        assert ((levels == level).float().mean((0, 1)) > 0.25).all()


def test_padding_does_not_count():
    torch.manual_seed(0)
    spread, mask = Spread(8, momentum=1.0), torch.ones(1, 300, 1)
    x = torch.randn(1, 300, 8)
    mask[:, 100:] = 0
    x[:, 100:] = 1e3
    spread(x, mask)
    assert spread.mean.abs().max() < 1
    assert spread.variance.max() < 3


def test_ids_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    tokenizer = SpeechTokenizer().eval()
    feats = torch.randn(2, 128, 401)
    together = tokenizer(feats, torch.tensor([401, 123]))
    assert together.shape == (2, 101)
    alone = tokenizer(feats[1:, :, :123], torch.tensor([123]))
    assert alone.dtype == torch.int32
    assert torch.equal(together[1, :31], alone[0])


def test_channels_that_say_the_same_are_told():
    torch.manual_seed(0)
    one, mask = torch.randn(2, 400, 1), torch.ones(2, 400, 1)
    assert correlation(one.expand(-1, -1, 8), mask) == pytest.approx(1.0, abs=1e-4)
    assert correlation(torch.randn(2, 400, 8), mask) < 0.01
