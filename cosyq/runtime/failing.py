"""What a listener is told of an error, and whether the device survived it."""

from __future__ import annotations

import logging

import torch

from cosyq.errors import CosyqError, DeviceError
from cosyq.runtime.flight import GoneError

log = logging.getLogger("cosyq.runtime")


def is_fatal(error: Exception) -> bool:
    """After an error of CUDA's own the process can do nothing more on the device."""
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


def lost(error: Exception) -> DeviceError:
    """What a fatal error means for everybody."""
    return DeviceError(f"the device has failed ({str(error).splitlines()[0][:160]})", where="device")


def explained(error: Exception) -> CosyqError:
    """What it means for a listener. Memory that ran out is given back, and a bug is logged."""
    if isinstance(error, CosyqError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return DeviceError("out of memory", where="device", remedy="give a shorter text")
    if is_fatal(error):
        return GoneError("the device has failed")
    log.exception("speaking failed", exc_info=error)
    return CosyqError(f"internal error: {type(error).__name__}")
