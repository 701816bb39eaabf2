"""What comes before the first kernel, begun early in threads: they wait for a disk and a driver, not for Python."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# cuBLAS takes 32 MiB for every stream on Hopper; a quarter of it does for products of this size.
WORKSPACE = ":4096:2:16:8"
VARIABLES = {
    "CUDA_MODULE_LOADING": "LAZY",  # as torch does, and as early as the driver reads it
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # it would look through what is installed
}


def begin_context(device: str, then: Callable[[Any, Any], None] | None = None) -> threading.Thread | None:
    """Let the GPU's context be made, which takes the driver some 0.3 s, while torch is imported; torch then finds it.

    Nothing happens where torch would not take that GPU into use, and what fails is left for torch to fail at.

    Args:
        device: auto, cpu, cuda or cuda:N.
        then: called in the thread, with the driver's library and the context, or with nothing in them.
    """
    index = _gpu(device)
    if index is None:
        return None
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    return _begin("context", lambda: _make_context(index, then))


def _gpu(device: str) -> int | None:
    """The index of the GPU that torch would take into use."""
    kind, _, index = device.partition(":")
    torch = find_spec("torch")
    if kind not in ("auto", "cuda") or not (index or "0").isdecimal() or torch is None or torch.origin is None:
        return None
    return int(index or 0) if (Path(torch.origin).parent / "lib" / "libtorch_cuda.so").exists() else None


def _make_context(index: int, then: Callable[[Any, Any], None] | None) -> None:
    """Retain the device's primary context, for good: the CUDA runtime, and torch by it, uses that one."""
    cuda, context = None, ctypes.c_void_p()
    with suppress(OSError, AttributeError):
        cuda, device = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), index) == 0:
            cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    if then is not None:
        then(cuda, context)


@cache
def begin_kernels(device: torch.device, dtype: torch.dtype) -> threading.Thread:
    """Begin, once a process, what the first kernels would wait for, and the first products in `dtype`.

    What is loaded at its first use is used: cuBLAS, which takes 0.1 s, and kernels of torch's in libraries of their
    own, up to 0.06 s each. They serve who comes when the thread is done.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)  # read with the first product
    return _begin("kernels", lambda: _use(device, dtype))


def _use(device: torch.device, dtype: torch.dtype) -> None:
    import torch
    import torch.nn.functional as F

    if device.type == "cuda":
        with suppress(RuntimeError), torch.inference_mode():
            x, some = torch.ones(16, 16, device=device), torch.zeros(1, dtype=torch.int32, device=device)
            weights = x.to(dtype)
            torch.addmm(weights[0], weights @ weights, weights)  # by cuBLAS and, with its bias, by cublasLt
            torch.cat([F.leaky_relu(x), F.embedding(some, weights).float() * (some >= 0)])
            torch._C._cuda_clearCublasWorkspaces()  # of a stream that multiplies no more


def _begin(name: str, work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread
