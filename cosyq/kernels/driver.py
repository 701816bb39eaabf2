"""The CUDA driver, as far as it takes to launch a compiled kernel.

Triton's own way to launch begins with importing it, which takes longer than all of this; see `docs/decisions.md`.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from cosyq.kernels.store import Binary

MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
INVALID_CONTEXT = 201  # CUresult
SHARED_WITHOUT_ASKING = 48 << 10  # bytes
WARP = 32
SIZES = {"Q": 8, "q": 8, "i": 4, "f": 4}  # of an argument


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, whose value is a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("value", ctypes.c_int * 17))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
# The value is behind four bytes of padding.
_OVERLAPPING = _Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, (ctypes.c_int * 17)(0, 1))


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    _check(getattr(_driver(), name)(*arguments), name)


def _check(code: int, name: str) -> None:
    """
    Raises:
        RuntimeError: the driver could not do it, in words as torch has them.
    """
    if code:
        found = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(found))
        raise RuntimeError(f"CUDA error: {name}: {(found.value or b'').decode() or code}")


def _make_current(device: int) -> None:
    """The context that torch uses, for this thread, which may have made no call of CUDA's yet."""
    context = ctypes.c_void_p()
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    _call("cuCtxSetCurrent", context)


def load(binary: Binary, device: int) -> Callable[[Sequence[int], Sequence[Any]], None]:
    """A function that launches the kernel with a grid and its arguments, laid open, on the device's current stream.

    Raises:
        ValueError: it takes other arguments than the binary says.
        AttributeError: the driver is too old to tell what it takes (before CUDA 12.4).
        RuntimeError: the driver cannot load it.
    """
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _make_current(device)
    _call("cuModuleLoadData", ctypes.byref(module), binary.code)
    _call("cuModuleGetFunction", ctypes.byref(function), module, binary.name.encode())
    _call("cuFuncLoad", function)  # not with the first launch, which may be recorded into a graph
    if binary.shared > SHARED_WITHOUT_ASKING:
        _call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_SIZE_BYTES, binary.shared)
    passed = [(at, kind) for at, kind in enumerate(binary.takes) if kind]
    sizes = _sizes(function)
    spare = sizes[len(passed) :]  # for addresses of scratch memory, of which it needs none
    if sizes[: len(passed)] != [SIZES[kind] for _, kind in passed] or any(size != 8 for size in spare):
        raise ValueError(f"{binary.name} takes {sizes} bytes, not {binary.takes}")

    packed = struct.Struct("=" + "".join(kind + f"{8 - SIZES[kind]}x" for _, kind in passed) + "8x" * len(spare))
    places = [at for at, _ in passed]
    addresses = ctypes.c_void_p * len(sizes)
    offsets = range(0, packed.size, 8)
    block = (ctypes.c_uint * 3)(WARP * binary.warps, 1, 1)
    attributes = ctypes.pointer(_OVERLAPPING) if binary.overlaps else None
    stream_of, entry = torch._C._cuda_getCurrentRawStream, _driver().cuLaunchKernelEx

    def launch(grid: Sequence[int], arguments: Sequence[Any]) -> None:
        values = ctypes.create_string_buffer(packed.pack(*[_plain(arguments[at]) for at in places]), packed.size or 1)
        begin = ctypes.addressof(values)
        programs = (ctypes.c_uint * 3)(*grid, *(1,) * (3 - len(grid)))
        config = _Config(programs, block, binary.shared, stream_of(device), attributes, binary.overlaps)
        given = ctypes.byref(config), function, addresses(*[begin + offset for offset in offsets]), None
        code = entry(*given)
        if code == INVALID_CONTEXT:
            _make_current(device)
            code = entry(*given)
        _check(code, "cuLaunchKernelEx")

    return launch


def _plain(argument: Any) -> Any:
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument


def _sizes(function: ctypes.c_void_p) -> list[int]:
    """Of what it takes, in bytes."""
    sizes: list[int] = []
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    ask = _driver().cuFuncGetParamInfo
    while ask(function, ctypes.c_size_t(len(sizes)), ctypes.byref(offset), ctypes.byref(size)) == 0:
        sizes.append(size.value)
    return sizes
