"""CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from cosyq.kernels.launch import at_once


def recorded(launch: Callable[[], None], pool: Any = None) -> torch.cuda.CUDAGraph:
    """What is launched on the current stream, which must not be the default one; nothing of it runs before a replay.

    torch.cuda.graph would besides collect garbage, which at a process's start is a fifth of a second, wait for the
    device and empty the allocator's cache.

    Args:
        pool: of a graph that is never replayed beside this one, whose memory it may use.
    """

    def record() -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool, capture_error_mode="relaxed")  # as loading a kernel may need
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # where what it launches is to be compiled
            try:
                launch()
            finally:
                graph.capture_end()
        return graph

    return at_once(record)
