"""What comes before the first kernel, begun early in threads: they wait for a disk and a driver, not for Python."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosyq.text.apart import may_fork

if TYPE_CHECKING:
    import torch

# cuBLAS takes 32 MiB for every stream on Hopper; a quarter of it does for products of this size.
WORKSPACE = ":4096:2:16:8"
VARIABLES = {
    "CUDA_MODULE_LOADING": "LAZY",  # as torch does, and as early as the driver reads it
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # both would look through what is installed
    "TRITON_BACKENDS_IN_TREE": "1",
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
def begin_kernels(device: torch.device, dtype: torch.dtype) -> tuple[threading.Thread, ...]:
    """Begin, once a process, what the first kernels would wait for, and the first products in `dtype`.

    Triton hashes itself, half a second, and keeps what it found: it is part of the names under which compiled kernels
    lie on the disk. And what is loaded at its first use is used: cuBLAS, which takes 0.1 s, and kernels of torch's in
    libraries of their own, up to 0.06 s each. They serve who comes when the threads are done.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)  # read with the first product
    os.environ.setdefault("TRITON_STORE_BINARY_ONLY", "1")  # what led to a kernel would be read with it, every time
    return _begin("compiler", _hash), _begin("kernels", lambda: _use(device, dtype))


def begin_hash(device: str) -> None:
    """Let a forked child hash Triton, before there are threads: one of them would want Python's lock a thousand times.

    Args:
        device: auto, cpu, cuda or cuda:N.
    """
    global _hashing
    if _hashing is None and _gpu(device) is not None and find_spec("triton") is not None and may_fork():
        with suppress(OSError):
            _hashing = _Hashing()


class _Hashing:
    """The child, whose answer is a line."""

    def __init__(self) -> None:
        answered, answer = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
                os.write(answer, _triton_key().encode() + b"\n")
            finally:
                os._exit(0)
        os.close(answer)
        self._answer = os.fdopen(answered, "rb")

    def key(self) -> str:
        """Nothing if the child could not tell."""
        with self._answer, suppress(OSError):
            said = self._answer.read()
            os.waitpid(self._child, 0)
            return said.decode().removesuffix("\n") if said.endswith(b"\n") else ""
        return ""


_hashing: _Hashing | None = None


def _hash() -> None:
    """Where this Triton has no such function, the first kernel waits for it."""
    global _hashing
    (key, _hashing) = ("" if _hashing is None else _hashing.key()), None
    with suppress(ImportError, OSError):
        from triton.runtime import cache

        if key and hasattr(cache, "triton_key"):
            cache.triton_key = lambda: key  # the name that names of kernels are made with
        else:
            _triton_key()


def _triton_key() -> str:
    from triton.runtime.cache import triton_key

    return str(triton_key())


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
