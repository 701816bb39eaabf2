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
        mel: what it was made of, float32; fetched too and looked at here, so that nobody has to wait for it before.
    """

    def __init__(self, wav: Tensor, mel: Tensor):
        self._count = len(wav)
        self._fetched = Fetched(torch.cat([wav, mel.flatten()]))

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
        wav, mel = self._fetched.tensor().tensor_split([self._count])
        if not torch.isfinite(mel).all():
            raise not_finite_mel()
        if not torch.isfinite(wav).all():
            raise DeviceError("the vocoder's samples are not finite", remedy="use fp32 for the vocoder")
        return wav


def not_finite_mel() -> DeviceError:
    return DeviceError("the flow's mel is not finite", remedy="use bf16 or fp32 arithmetic")
