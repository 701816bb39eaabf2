"""The flow's calibration: what the estimator's layers are given on all its Euler steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cosyq.calibrate.moments import Moments, by_weight
from cosyq.model.flow import Flow, start_noise, time_steps
from cosyq.runtime.engine import Chunk, solve
from cosyq.sequences import Heard, Progress


def flow_moments(flow: Flow, heard: Sequence[Heard], paths: Sequence[str], progress: Progress) -> Moments:
    """Of the estimator's layers named, while it renders what was spoken, whole.

    A step adds dt ((1 + g) conditional - g unconditional) to the mel: inputs of either branch count by the square of
    its share. The two branches' errors are taken as independent.
    """
    moments = Moments(paths)
    device, guidance = flow.speaker_proj.weight.device, flow.config.guidance
    noise = start_noise(flow.config).to(device)
    branches = torch.tensor([1 + guidance, guidance], device=device).square()[:, None, None]
    for index, item in enumerate(heard):
        progress("listening to the flow", index, len(heard))
        sizes = iter(time_steps(item.manner.steps)[1])
        step = _Step(branches)
        chunk = Chunk(list(item.audible), item.voice, False, True, item.manner.steps)
        with by_weight(flow, moments, step.weights):
            solve(flow, chunk, noise, between=lambda sizes=sizes, step=step: step.begin(next(sizes)))  # type: ignore[misc]
    return moments


class _Step:
    """The Euler step that is being done, and what its inputs count."""

    def __init__(self, branches: Tensor):
        self._branches, self._size = branches, 0.0

    def begin(self, size: float) -> None:
        self._size = size

    def weights(self, inputs: Tensor) -> Tensor:
        return self._branches * self._size**2
