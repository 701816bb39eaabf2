"""The time until an engine speaks: what is begun before torch is imported, and what is left until later."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cosyq.artifact import ahead
from cosyq.artifact.names import HOST_TENSOR, STAGE_FILES
from cosyq.kernels.start import begin_context, begin_kernels
from cosyq.text import apart
from cosyq.text.tokenizer import FILE_NAME

SWITCH = 1e-4  # seconds after which Python's lock goes to another thread that wants it


@contextmanager
def starting(folder: Path, device: str, dtype: str = "auto", engine: str = "auto") -> Iterator[None]:
    """An artifact's engine is loaded within; enter it before torch is imported, and leave it to speak.

    What is done in threads seldom needs Python's lock, but would wait 5 ms for it every time.

    Imports make half a million objects, which are there to stay, and Python's collector would look at all of them again
    and again.

    Arguments as in `runtime.synthesizer.load`.
    """
    fused = engine in ("auto", "fused", "fused8")
    apart.begin(folder / FILE_NAME)  # before there is a thread
    ahead.announce({folder / name: HOST_TENSOR.get(stage) for stage, name in STAGE_FILES.items()})

    contexts: list[Any] = []

    def then(cuda: Any, context: Any) -> None:
        if context:
            contexts.append(context)
        ahead.read(cuda, context)

    context = begin_context(device, then)
    begun = [] if context is None else [context]
    if not begun:
        ahead.forget()
    collected, switch = gc.isenabled(), sys.getswitchinterval()
    gc.disable()
    sys.setswitchinterval(SWITCH)
    try:
        if begun and fused:
            import torch

            if contexts:
                arithmetic = {"fp16": torch.float16, "fp32": torch.float32}.get(dtype, torch.bfloat16)
                begun.append(begin_kernels(torch.device("cuda" if device == "auto" else device), arithmetic))
        yield
    finally:
        ahead.forget()
        for thread in begun:  # a process that ends within the driver's or torch's code is aborted
            thread.join()
        sys.setswitchinterval(switch)
        if collected:
            gc.freeze()
            gc.unfreeze()  # both together: what is there is old, and is looked at when old objects are
            gc.enable()
