"""Compiled kernels on disk, in the user's cache, so that a process that finds them needs no compiler.

A file holds one: a line of JSON that says how it is launched, and the code. Its name is a hash of the kernel's name, of
what was compiled into it, and of the kind of GPU. Its folder's name is a hash of the source of all kernels and of the
compiler, so that nothing outlives either.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from cosyq.errors import ArtifactError
from cosyq.files import cache_folder, whole_file

# What says where Triton is and keeps things, not how it compiles.
INDIFFERENT = {"TRITON_BACKENDS_IN_TREE", "TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_INTERPRET"}


@dataclass(frozen=True)
class Binary:
    """A kernel compiled for one kind of GPU.

    name: of its function in the code.
    shared: bytes of shared memory that a program takes.
    warps: of a program.
    overlaps: it is launched to start while the one before it ends.
    takes: of each argument, tuples laid open, how it is handed over, as in `struct`: Q an address, i and q whole
        numbers of 4 and 8 bytes, f a float32; nothing where it was compiled in.
    code: as the driver loads it.
    """

    name: str
    shared: int
    warps: int
    overlaps: bool
    takes: tuple[str, ...]
    code: bytes

    def to_bytes(self) -> bytes:
        about = asdict(self) | {"code": len(self.code)}
        return json.dumps(about).encode() + b"\n" + self.code

    @staticmethod
    def from_bytes(data: bytes) -> Binary:
        """
        Raises:
            ValueError: that is none, or not all of it.
        """
        line, _, code = data.partition(b"\n")
        about = json.loads(line)
        if not isinstance(about, dict) or set(about) != {field.name for field in fields(Binary)}:
            raise ValueError("not a kernel")
        takes = tuple(about.pop("takes"))
        if about.pop("code") != len(code) or not set(takes) <= {"", "Q", "q", "i", "f"}:
            raise ValueError("not all of a kernel")
        return Binary(**about, takes=takes, code=code)


@cache
def folder() -> Path | None:
    """None for a user who has no home."""
    with suppress(RuntimeError):
        return cache_folder("kernels") / _origin()
    return None


def _origin() -> str:
    """Of all that decides what a kernel's code is, but for its constants and the GPU."""
    made_of = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        made_of.update(path.read_bytes())
    with suppress(importlib.metadata.PackageNotFoundError):
        made_of.update(importlib.metadata.version("triton").encode())
    chosen = {k: v for k, v in os.environ.items() if k.startswith("TRITON_") and k not in INDIFFERENT}
    made_of.update(json.dumps(chosen, sort_keys=True).encode())
    return made_of.hexdigest()[:16]


def _name(key: Any) -> str:
    return f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.kernel"


def find(key: Any) -> Binary | None:
    """What was kept under `key`, whose `repr` is its own; None where there is nothing whole."""
    if (there := folder()) is not None:
        with suppress(OSError, ValueError, TypeError, KeyError):
            return Binary.from_bytes((there / _name(key)).read_bytes())
    return None


def keep(key: Any, binary: Binary) -> None:
    """For the next process; nothing happens where that cannot be written."""
    if (there := folder()) is not None:
        with suppress(OSError, ArtifactError):
            there.mkdir(parents=True, exist_ok=True, mode=0o700)
            with whole_file(there / _name(key)) as partial:
                partial.write_bytes(binary.to_bytes())
