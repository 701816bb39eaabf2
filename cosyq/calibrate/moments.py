"""Second moments of what linear layers are given, summed up while a network is at work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Weigh = Callable[[Tensor], Tensor]  # inputs [b, t, in] -> the weight of each, broadcast to [b, t, 1]


class Moments:
    """By a layer's path: sum of w x x^T over its inputs x, [in, in] float32, w their weights."""

    def __init__(self, paths: Iterable[str]):
        self.paths = tuple(paths)
        self._sums: dict[str, Tensor] = {}

    def add(self, path: str, inputs: Tensor, weights: Tensor) -> None:
        """inputs [..., in], weights [..., 1]."""
        width = inputs.shape[-1]
        weighted = (inputs * weights).reshape(-1, width).float()
        product = weighted.T @ inputs.reshape(-1, width).float()
        self._sums[path] = self._sums[path].add_(product) if path in self._sums else product

    def of(self, path: str) -> Tensor:
        """A layer's moment, scaled to a mean square of 1; zeros where it was given nothing else.

        Raises:
            ValueError: the layer was given nothing at all.
        """
        if path not in self._sums:
            raise ValueError("it was never used")
        total = self._sums[path]
        mean = total.diagonal().mean()
        return total / torch.where(mean > 0, mean, 1)


@contextmanager
def by_gradient(network: nn.Module, moments: Moments) -> Iterator[None]:
    """Inputs count by the mean square of the gradient of what the layer made of them, when backward is called."""

    def watch(path: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def after(module: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
            seen = given[0].detach()
            output.register_hook(lambda g: moments.add(path, seen, g.square().mean(-1, keepdim=True)))

        return after

    handles = [network.get_submodule(path).register_forward_hook(watch(path)) for path in moments.paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def by_weight(network: nn.Module, moments: Moments, weigh: Weigh) -> Iterator[None]:
    """Inputs count as `weigh` says."""

    def watch(path: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda module, given: moments.add(path, given[0], weigh(given[0]))

    handles = [network.get_submodule(path).register_forward_pre_hook(watch(path)) for path in moments.paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
