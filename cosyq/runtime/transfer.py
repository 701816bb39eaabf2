"""To a device and back, without waiting for what it has to do meanwhile. On a CPU everything is there at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sent(values: Any, device: torch.device) -> Tensor:
    """Numbers of the host, or a tensor, on the device."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Mark:
    """All that a device was given to do so far, on the caller's current stream."""

    def __init__(self, device: torch.device):
        self._device = device
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self.again()

    def again(self) -> None:
        """The same of what it was given since."""
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    @property
    def passed(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Until it is done; other threads can run."""
        if self._event is not None:
            self._event.synchronize()


class Fetched:
    """A tensor on its way to the host."""

    def __init__(self, tensor: Tensor):
        self._host = tensor.to("cpu", non_blocking=True, copy=True)
        self._mark = Mark(tensor.device)

    @property
    def ready(self) -> bool:
        return self._mark.passed

    def tensor(self) -> Tensor:
        """It, on the host; waited for."""
        self._mark.wait()
        return self._host
