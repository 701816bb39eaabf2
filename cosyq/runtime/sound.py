"""Samples on their way from a device."""

from __future__ import annotations

import torch
from torch import Tensor

from cosyq.errors import DeviceError
from cosyq.runtime.transfer import Fetched


class Sound:
    """What a vocoder makes of a mel. How many samples they are is known before they are there.

    Args:
        wav: [n] float32, on the device.
        mel: what it was made of, checked here so that nobody has to wait for it before.
    """

    def __init__(self, wav: Tensor, mel: Tensor):
        self._count = len(wav)
        is_finite = torch.isfinite(mel).all().to(wav.dtype)
        self._fetched = Fetched(torch.cat([wav, is_finite[None]]))

    def __len__(self) -> int:
        return self._count

    @property
    def ready(self) -> bool:
        """Whether `samples` has nothing to wait for."""
        return self._fetched.ready

    def samples(self) -> Tensor:
        """[n] float32 on the host.

        Raises:
            DeviceError: they, or the mel, are not finite.
        """
        found = self._fetched.tensor()
        if not found[self._count]:
            raise not_finite_mel()
        wav = found[: self._count]
        if not torch.isfinite(wav).all():
            raise DeviceError("the vocoder's samples are not finite", remedy="use fp32 for the vocoder")
        return wav


def not_finite_mel() -> DeviceError:
    return DeviceError("the flow's mel is not finite", remedy="use bf16 or fp32 arithmetic")
