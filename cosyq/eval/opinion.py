"""How natural speech sounds: DistillMOS' prediction of the mean opinion of listeners, 1 to 5.

Stahl and Gamper, Distillation and pruning for scalable self-supervised representation-based speech quality assessment
(ICASSP 2025); package `distillmos`, its weights inside it. It hears nothing above 8 kHz: compare like with like.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from importlib import metadata
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray

from cosyq.audio.recording import Recording
from cosyq.errors import UsageError

RATE = 16_000
SHORTEST = 0.5  # seconds: of less there is no opinion


class Opinion:
    """name: what it is and its version, for a report.

    Raises:
        UsageError: it is not installed.
    """

    def __init__(self) -> None:
        # It prints where its weights lie.
        with _without_torchaudio(), contextlib.redirect_stdout(io.StringIO()):
            try:
                from distillmos import ConvTransformerSQAModel
            except ImportError as error:
                remedy = "pip install --no-deps distillmos xls-r-sqa"
                raise UsageError(f"cannot be imported ({error})", where="distillmos", remedy=remedy) from None
            self._model = ConvTransformerSQAModel().eval()
        self.name = f"DistillMOS {metadata.version('distillmos')}"

    def __call__(self, samples: NDArray[np.float32], rate: int) -> float | None:
        """Of [n] samples in -1..1; None where there are too few."""
        if len(samples) < SHORTEST * rate:
            return None
        with torch.inference_mode():
            return float(self._model(torch.from_numpy(Recording(samples, rate).at(RATE))[None]))


@contextlib.contextmanager
def _without_torchaudio() -> Iterator[None]:
    """An empty module stands for torchaudio while distillmos is imported, which reads files with it and nothing else.

    Its wheels want the very torch that they were built with, and do not say so.
    """
    found = sys.modules.get("torchaudio")
    sys.modules["torchaudio"] = ModuleType("torchaudio")
    try:
        yield
    finally:
        del sys.modules["torchaudio"]
        if found is not None:
            sys.modules["torchaudio"] = found
