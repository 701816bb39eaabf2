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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# cuBLAS takes 32 MiB for every stream on Hopper; a quarter of it does for products of this size.
WORKSPACE = ":4096:2:16:8"


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


@cache
def begin_kernels(device: torch.device, dtype: torch.dtype) -> tuple[threading.Thread, ...]:
    """Begin, once a process, what the first kernels would wait for, and the first products in `dtype`.

    Triton hashes itself, half a second, and keeps what it found: it is part of the names under which compiled kernels
    lie on the disk. And what is loaded at its first use is used: cuBLAS, which takes 0.1 s, and kernels of torch's in
    libraries of their own, up to 0.06 s each. They serve who comes when the threads are done.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)  # read with the first product
    return _begin("compiler", _hash), _begin("kernels", lambda: _use(device, dtype))


def _hash() -> None:
    """Where this Triton has no such function, the first kernel waits for it."""
    with suppress(ImportError, OSError):
        from triton.runtime.cache import triton_key

        triton_key()


def _use(device: torch.device, dtype: torch.dtype) -> None:
    import torch
    import torch.nn.functional as F

    if device.type == "cuda":
        with suppress(RuntimeError), torch.inference_mode():
            x, some = torch.ones(16, 16, device=device), torch.zeros(1, dtype=torch.int64, device=device)
            weights = x.to(dtype)
            torch.addmm(weights[0], weights @ weights, weights)  # by cuBLAS and, with its bias, by cublasLt
            torch.linalg.vector_norm(x.double(), dim=1)
            torch.isfinite(x).all()
            torch.pow(2.0, x)
            torch.index_select(x, 0, some)
            F.normalize(x[0], dim=0)
            torch._C._cuda_clearCublasWorkspaces()  # of a stream that multiplies no more


def _begin(name: str, work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread
