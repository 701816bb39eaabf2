"""What Triton does before its first kernel, begun early."""

from __future__ import annotations

import threading
from contextlib import suppress


def hash_compiler() -> threading.Thread:
    """Let Triton hash itself in a thread, half a second, while weights are read; it keeps what it found.

    It is part of the names under which compiled kernels lie on the disk. Where this Triton has no such function, the
    first kernel waits for it.
    """
    thread = threading.Thread(target=_hash, name="compiler", daemon=True)
    thread.start()
    return thread


def _hash() -> None:
    with suppress(ImportError, OSError):
        from triton.runtime.cache import triton_key

        triton_key()
