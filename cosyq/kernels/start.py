"""What comes before the first kernel, begun early in threads: they wait for a disk and a driver, not for Python."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def begin_context(device: str) -> threading.Thread | None:
    """Let the GPU's context be made, which takes the driver some 0.3 s, while torch is imported; torch then finds it.

    Nothing happens where torch would not take that GPU into use, and what fails is left for torch to fail at.

    Args:
        device: auto, cpu, cuda or cuda:N.
    """
    kind, _, index = device.partition(":")
    torch = find_spec("torch")
    if kind not in ("auto", "cuda") or not (index or "0").isdecimal() or torch is None or torch.origin is None:
        return None
    if not (Path(torch.origin).parent / "lib" / "libtorch_cuda.so").exists():
        return None
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch does, and as early as the driver reads it
    return _begin("context", lambda: _make_context(int(index or 0)))


def _make_context(index: int) -> None:
    """Retain the device's primary context, for good: the CUDA runtime, and torch by it, uses that one."""
    with suppress(OSError, AttributeError):
        cuda = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), index) == 0:
            cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def hash_compiler() -> threading.Thread:
    """Let Triton hash itself, half a second, while weights are read; it keeps what it found.

    It is part of the names under which compiled kernels lie on the disk. Where this Triton has no such function, the
    first kernel waits for it.
    """
    return _begin("compiler", _hash)


def _hash() -> None:
    with suppress(ImportError, OSError):
        from triton.runtime.cache import triton_key

        triton_key()


def begin_products(device: torch.device, dtype: torch.dtype) -> threading.Thread:
    """Let cuBLAS be made ready, 0.15 s, while weights are read; it serves who comes when the thread is done."""
    return _begin("products", lambda: _multiply(device, dtype))


def _multiply(device: torch.device, dtype: torch.dtype) -> None:
    import torch

    if device.type == "cuda":
        with suppress(RuntimeError), torch.inference_mode():
            x = torch.zeros(16, 16, device=device, dtype=dtype)
            torch.addmm(x[0], x @ x, x)  # by cuBLAS and, with its bias, by cublasLt
            torch._C._cuda_clearCublasWorkspaces()  # of a stream that multiplies no more


def _begin(name: str, work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread
