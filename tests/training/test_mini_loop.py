"""A stage whose loss comes apart goes back to its good weights, and never saves the bad ones."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # the training code is not part of the package

from training.mini.loop import KEEP_EVERY, PATIENCE, READ_EVERY, Stage

SOUND = READ_EVERY * KEEP_EVERY * 2  # steps


class Pull(nn.Module):
    """One number, pulled to 1 at first and then elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1))

    def forward(self, goal: float) -> Tensor:
        return (self.weight - goal).square().sum() + self.bias.square().sum() + 0.1


@pytest.fixture
def stage(tmp_path) -> Stage:
    args = argparse.Namespace(work=tmp_path, checkpoints=tmp_path, seconds=1e6, rate=None)
    return Stage("pull", Pull(), args, rate=0.02)


def saved(stage: Stage) -> float:
    stage.save()
    return float(load_file(stage.path)["weight"])


def run(stage: Stage, steps: int, goal: float, scale: float = 1.0) -> None:
    for _ in range(steps):
        stage.current_rate.fill_(stage.rate)
        stage.descend(stage.network(goal) * scale)
        stage.finish_step()


def test_an_exploding_loss_keeps_the_good_weights(stage, capsys):
    run(stage, SOUND, goal=1.0)
    assert saved(stage) == pytest.approx(1.0, abs=0.02)
    run(stage, 3 * READ_EVERY, goal=-50.0)
    assert float(stage.network.weight.detach()) < 0.9, "it does go astray"
    assert saved(stage) == pytest.approx(1.0, abs=0.02), "not back yet, but not saved either"
    run(stage, PATIENCE * READ_EVERY, goal=-50.0)
    assert "came apart" in capsys.readouterr().out
    assert stage.rate <= 0.01
    assert saved(stage) == pytest.approx(1.0, abs=0.02)
    run(stage, SOUND, goal=1.0)
    assert not stage.guard.lost, "and goes on"


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_counts(stage, scale, capsys):
    run(stage, SOUND, goal=1.0)
    run(stage, (PATIENCE + 1) * READ_EVERY, goal=0.5, scale=scale)
    assert "came apart" in capsys.readouterr().out
    assert saved(stage) == pytest.approx(1.0, abs=0.02)


def test_a_rough_loss_is_left_alone(stage, capsys):
    for number in range(40):
        run(stage, READ_EVERY // 2, goal=1.0 + 0.1 * (number % 2))
    assert "came apart" not in capsys.readouterr().out
    assert stage.rate == 0.02
