"""Repetition-aware sampling (VALL-E 2, arXiv 2406.05370) for a batch, on the device, in operations of fixed shape.

Nothing waits for the host and nothing depends on the data but the result, so a CUDA graph can hold it. Randomness comes
in as uniform numbers that each request drew for itself: a row's ids do not depend on its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosyq.model.config import SamplingConfig


def sample_rows(
    logits: Tensor, recent: Tensor, uniform: Tensor, config: SamplingConfig, *, forbidden: Tensor, forbid_from: int
) -> Tensor:
    """Draw the next id of every row.

    Args:
        logits: [b, rows] float32.
        recent: [b, win_size] the ids drawn last, in any order; -1 where there was none.
        uniform: [b, 2] float32 in 0..1, for the draw and for the second draw of a row that repeats itself.
        forbidden: [b] bool, rows that may draw no id from `forbid_from` up.

    Returns:
        ids [b] int64; of a row whose logits are not finite, -1.
    """
    finite = torch.isfinite(logits).all(dim=-1)
    stop = torch.arange(logits.shape[-1], device=logits.device) >= forbid_from
    logits = logits.masked_fill(forbidden[:, None] & stop, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    drawn = _nucleus(probabilities, config, uniform[:, :1])
    repeated = (recent == drawn).sum(dim=-1, keepdim=True) >= config.win_size * config.tau_r
    others = probabilities.scatter(-1, drawn, 0.0)
    ids = torch.where(repeated, _draw(others, uniform[:, 1:]), drawn)[:, 0]
    return torch.where(finite, ids, -1)


def _nucleus(probabilities: Tensor, config: SamplingConfig, uniform: Tensor) -> Tensor:
    """From the likeliest ids of a row, at most `top_k`, until together they reach `top_p`: [b, 1]."""
    values, ids = probabilities.topk(min(config.top_k, probabilities.shape[-1]), dim=-1)
    before = values.cumsum(-1) - values
    return ids.gather(-1, _draw(values * (before < config.top_p), uniform))


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """The index where the running sum of `weights` [b, n] passes `uniform` [b, 1] of it: [b, 1].

    An index of weight zero is never drawn: the sum does not pass anything there.
    """
    sums = weights.double().cumsum(-1)
    target = uniform.double() * sums[:, -1:]
    index = (sums <= target).sum(dim=-1, keepdim=True)
    last = torch.where(weights > 0, torch.arange(weights.shape[-1], device=weights.device), 0).amax(-1, keepdim=True)
    return torch.minimum(index, last)  # a uniform number that rounds to one
