"""Repetition-aware sampling (VALL-E 2, arXiv 2406.05370): nucleus, and a second draw where it repeats itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cosyq.errors import DeviceError
from cosyq.model.config import SamplingConfig


def sample(
    logits: Tensor,
    history: Sequence[int],
    config: SamplingConfig,
    generator: torch.Generator,
    *,
    forbid_from: int | None,
) -> int:
    """Draw the next id.

    Args:
        logits: [rows] float32 on the host.
        history: the ids drawn so far.
        generator: the only source of randomness, on the host.
        forbid_from: no id from here up may be drawn (speech must not end yet); None allows all.

    Raises:
        DeviceError: the logits are not finite.
    """
    if not torch.isfinite(logits).all():
        raise DeviceError("the language model's logits are not finite", remedy="use bf16 or fp32 arithmetic")
    if forbid_from is not None:
        logits = logits.clone()
        logits[forbid_from:] = -torch.inf
    probabilities = logits.softmax(dim=-1)
    drawn = _nucleus(probabilities, config.top_p, config.top_k, generator)
    repeated = sum(previous == drawn for previous in history[-config.win_size :])
    if repeated >= config.win_size * config.tau_r:
        probabilities = probabilities.clone()
        probabilities[drawn] = 0
        drawn = _draw(probabilities, generator)
    return drawn


def _nucleus(probabilities: Tensor, top_p: float, top_k: int, generator: torch.Generator) -> int:
    """From the likeliest ids, at most `top_k`, until together they reach `top_p`."""
    values, ids = probabilities.sort(descending=True, stable=True)
    values, ids = values[:top_k], ids[:top_k]
    before = values.cumsum(0) - values
    return int(ids[_draw(values * (before < top_p), generator)])


def _draw(weights: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(weights, 1, generator=generator))
