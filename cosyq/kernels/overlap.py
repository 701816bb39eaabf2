"""Programmatic dependent launch, see `cosyq.kernels.device.overlap`."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def overlapping(device: torch.device) -> dict[str, Any]:
    """How to launch a kernel so that it starts while the one before it ends, where the device can."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
