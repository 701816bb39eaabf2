"""Kernels by name, launched as Triton's are."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from typing import Any


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


class Kernel:
    """`NAME_kernel` of a module of `cosyq.kernels.device`: `kernel[grid](*arguments, **constants)`."""

    def __init__(self, module: str, name: str):
        self._module, self._name = module, name

    @cached_property
    def _compiler(self) -> Any:
        return getattr(import_module(f"cosyq.kernels.device.{self._module}"), f"{self._name}_kernel")

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        launch: Callable[..., Any] = self._compiler[grid]
        return launch
