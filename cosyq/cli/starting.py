"""The time until an engine speaks: what is begun before torch is imported, and what is left until later."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cosyq.kernels.start import begin_context
from cosyq.text import apart
from cosyq.text.tokenizer import FILE_NAME


@contextmanager
def starting(folder: Path, device: str) -> Iterator[None]:
    """An artifact's engine is loaded within; enter it before torch is imported, and leave it to speak.

    Imports make half a million objects, which are there to stay, and Python's collector would look at all of them again
    and again.
    """
    apart.begin(folder / FILE_NAME)  # before there is a thread
    begin_context(device)
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.freeze()
            gc.unfreeze()  # both together: what is there is old, and is looked at when old objects are
            gc.enable()
