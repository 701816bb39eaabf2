"""A training step as one CUDA graph: launched by one call instead of two thousand.

These networks are small: their kernels take microseconds, and launching them one by one leaves the device idle
most of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class Replay:
    """Runs a kind of work as it is at first, which lets libraries choose their kernels, then as a graph of it.

    The work must not wait for the device, and what it leaves behind (weights, moments, readings) must live in
    memory that was there before. Inputs may change in value; another shape is another graph. Where it is not
    `enabled`, the work is simply done.
    """

    def __init__(self, *, enabled: bool):
        self.enabled = enabled
        self.seen: set[Hashable] = set()
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}
        self.pool = torch.cuda.graph_pool_handle() if enabled else None  # shared: graphs run one at a time

    def __call__(self, kind: Hashable, work: Callable[..., None], *inputs: Tensor) -> None:
        key = (kind, *(tuple(i.shape) for i in inputs))
        if not self.enabled or key not in self.seen:
            self.seen.add(key)
            work(*inputs)
            return
        if key not in self.graphs:
            self.graphs[key] = self._record(work, inputs)
        graph, places = self.graphs[key]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value, non_blocking=True)
        graph.replay()

    def _record(
        self, work: Callable[..., None], inputs: tuple[Tensor, ...]
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
        """Nothing is computed while it is recorded. The stream is the one that everything else runs on, too."""
        places = tuple(i.clone() for i in inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=torch.cuda.current_stream()):
            work(*places)
        return graph, places

    def forget(self) -> None:
        """What the graphs write to has been replaced."""
        self.graphs.clear()
