"""Repetition-aware sampling (VALL-E 2, arXiv 2406.05370): nucleus, and a second draw where it repeats itself.

For one utterance, id by id; the arithmetic and the random numbers are those of a batch's row (`batch_sampling`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cosyq.errors import DeviceError
from cosyq.model.config import SamplingConfig
from cosyq.runtime.batch_sampling import sample_rows


def draws(room: int, generator: torch.Generator) -> Tensor:
    """The random numbers of an utterance of at most `room` ids, [room, 2] float32 on the host.

    Those of a smaller room are the first of them.
    """
    return torch.rand(room, 2, generator=generator)


def sample(
    logits: Tensor, history: Sequence[int], config: SamplingConfig, uniform: Tensor, *, forbid_from: int | None
) -> int:
    """Draw the next id.

    Args:
        logits: [rows] float32.
        history: the ids drawn so far.
        uniform: [2] float32 in 0..1, the only source of randomness.
        forbid_from: no id from here up may be drawn (speech must not end yet); None allows all.

    Raises:
        DeviceError: the logits are not finite.
    """
    last = list(history[-config.win_size :])
    recent = torch.tensor([last + [-1] * (config.win_size - len(last))], device=logits.device)
    forbidden = torch.tensor([forbid_from is not None], device=logits.device)
    stop = len(logits) if forbid_from is None else forbid_from
    drawn = sample_rows(
        logits[None], recent, uniform[None].to(logits.device), config, forbidden=forbidden, forbid_from=stop
    )
    if (token := int(drawn)) < 0:
        raise not_finite()
    return token


def not_finite() -> DeviceError:
    return DeviceError("the language model's logits are not finite", remedy="use bf16 or fp32 arithmetic")
