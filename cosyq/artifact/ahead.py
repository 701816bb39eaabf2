"""Files read into a GPU's memory while torch is imported.

It takes as long as importing a part of torch does, but neither Python nor the locks on this process's memory that
imports take: page-locked memory, from which torch would copy by itself, made importing it half a second longer.
"""

from __future__ import annotations

import ctypes
import json
import os
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

PIECE = 16 << 20  # bytes read at a time
MAX_HEADER = 100 << 20  # the format's own limit
SPARE = 3  # times as many bytes must be free there


class OnDevice:
    """The first bytes of a safetensors file on a GPU, freed with this object; torch can have them as a tensor.

    header: its first bytes, which say how long it is and then what it is.
    whole: how many bytes the file had.
    """

    def __init__(self, cuda: Any, header: bytes, size: int, whole: int):
        address = ctypes.c_uint64()
        if cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)) != 0:
            raise MemoryError
        weakref.finalize(self, cuda.cuMemFree_v2, address).atexit = False
        self.header, self.size, self.whole, self.address = header, size, whole, address.value

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.address, False), "version": 2}


class _Reading:
    def __init__(self, until: str | None):
        self.until, self.wanted, self.done = until, True, Event()
        self.found: OnDevice | None = None


_begun: dict[Path, _Reading] = {}


def announce(files: Mapping[Path, str | None]) -> None:
    """These safetensors files will be read by `read`, as far as a tensor that is not wanted; `taken` waits for it."""
    _begun.update((path, _Reading(until)) for path, until in files.items())


def forget() -> None:
    """What was not taken is not wanted: no more of it is read, and it is freed."""
    while _begun:
        _begun.popitem()[1].wanted = False


def read(cuda: Any, context: Any) -> None:
    """Read what was announced, one after another; what fails is left out.

    Args:
        cuda: the driver's library.
        context: of the GPU; none where there is no GPU.
    """
    waiting = list(_begun.items())
    try:
        if context and cuda.cuCtxSetCurrent(context) == 0 and _fits(cuda, [path for path, _ in waiting]):
            for path, reading in waiting:
                with suppress(OSError, MemoryError, ValueError, KeyError, TypeError):
                    reading.found = _read(cuda, path, reading)
                reading.done.set()
    finally:
        for _, reading in waiting:
            reading.done.set()


def _fits(cuda: Any, paths: list[Path]) -> bool:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    with suppress(OSError):
        return SPARE * sum(path.stat().st_size for path in paths) < free.value
    return False


def _read(cuda: Any, path: Path, reading: _Reading) -> OnDevice | None:
    piece = bytearray(PIECE)
    address = (ctypes.c_char * PIECE).from_buffer(piece)
    with path.open("rb", buffering=0) as file, memoryview(piece) as view:
        whole = size = os.fstat(file.fileno()).st_size
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > min(whole, MAX_HEADER):
            return None
        file.seek(0)
        header = file.read(start)
        if reading.until is not None:
            size = start + int(json.loads(header[8:])[reading.until]["data_offsets"][0])
        if not start < size <= whole:
            return None
        found, done = OnDevice(cuda, header, size, whole), 0
        file.seek(0)
        while done < size:
            count = file.readinto(view[: min(PIECE, size - done)]) if reading.wanted else 0
            place = ctypes.c_uint64(found.address + done)
            if not count or cuda.cuMemcpyHtoD_v2(place, address, ctypes.c_size_t(count)) != 0:
                return None
            done += count
        return found


def taken(path: Path) -> OnDevice | None:
    """A file's bytes as they were when they were read, once; None where it was not announced or could not be read."""
    reading = _begun.pop(path, None)
    if reading is None:
        return None
    reading.done.wait()
    return reading.found
