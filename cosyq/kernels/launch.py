"""Kernels by name: launched as they were compiled at some time, and compiled where they were not."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache, cached_property, partial
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor

from cosyq.kernels import driver, store
from cosyq.kernels.store import Binary

HANDED_OVER = {"i32": "i", "i64": "q", "u64": "Q", "fp32": "f", "constexpr": ""}  # by Triton's names of types
ALIGNED = 16  # bytes of an address, or whole numbers that are a multiple of it, are compiled as such


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


T = TypeVar("T")
UNKNOWN = "unknown"  # kind of what Triton has to hand over

Launch = Callable[[Sequence[int], Sequence[Any]], None]


class Kernel:
    """`NAME_kernel` of a module of `cosyq.kernels.device`, launched by `kernel[grid](*arguments, **constants)`.

    Tensors, numbers and None are arguments, in tuples too; what is compiled in, and what Triton has besides
    (`num_warps`), has a name. Tensors lie on one device; where that is no GPU, Triton has to interpret it.
    """

    def __init__(self, module: str, name: str):
        self._module, self._name = module, name
        self._found: dict[Any, Launch | None] = {}

    @cached_property
    def _triton(self) -> Any:
        return getattr(import_module(f"cosyq.kernels.device.{self._module}"), f"{self._name}_kernel")

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: Sequence[int], *arguments: Any, **constants: Any) -> None:
        values = list(_laid_open(arguments))
        device = next((value.device for value in values if isinstance(value, Tensor)), None)
        if device is None or device.type != "cuda":
            self._triton[grid](*arguments, **constants)
            return
        key = device.index, _kind(arguments), tuple(constants.items())
        if key not in self._found:
            named = self._module, self._name, torch.cuda.get_device_capability(device), *key[1:]
            binary = store.find(named)
            if binary is None and UNKNOWN not in _laid_open(key[1]):
                job = partial(self._compile, named, grid, arguments, constants)
                if _turn.whole:
                    raise _NotCompiledError
                if _turn.order is not None:
                    _turn.order((self, key), job)
                    return
                binary = job()
            self._found[key] = _loaded(binary, device.index)
        if _turn.order is not None:
            return
        launch = self._found[key]
        if launch is None:
            self._triton[grid](*arguments, **constants)
        else:
            launch(grid, values)

    def _compile(self, named: Any, grid: Any, arguments: Any, constants: Any) -> Binary | None:
        _tell()
        binary = compiled(self._triton.warmup(*arguments, grid=grid, **constants), len(arguments))
        if binary is not None:
            store.keep(named, binary)
        return binary


class _Turn(threading.local):
    """What a thread does with kernels.

    whole: it launches none unless all are compiled.
    order: it launches none; those that are not compiled are ordered.
    """

    whole = False
    order: Callable[[Any, Callable[[], Any]], None] | None = None


class _NotCompiledError(Exception):
    pass


_turn = _Turn()


def at_once(work: Callable[[], T]) -> T:
    """What `work` returns, which does nothing but launch kernels for a graph, and can be done again.

    If one of them is not compiled, all that are not are compiled first, side by side: a first start of some sixty, each
    a second or more of a core, would else take as long as all of them.
    """
    try:
        _turn.whole = True
        return work()
    except _NotCompiledError:
        pass
    finally:
        _turn.whole = False
    jobs: dict[Any, Future[Any]] = {}
    pool = ThreadPoolExecutor(os.cpu_count(), "compiling")

    def order(key: Any, job: Callable[[], Any]) -> None:
        if key not in jobs:
            jobs[key] = pool.submit(job)

    try:
        _turn.order = order
        work()
        _turn.order = None
        for job in jobs.values():
            job.result()
    finally:
        _turn.order = None
        pool.shutdown(cancel_futures=True)
    return work()


def _loaded(binary: Binary | None, device: int) -> Launch | None:
    """None where only Triton can launch it."""
    with suppress(OSError, AttributeError, ValueError):  # of a driver that is too old, or not Linux's
        return None if binary is None else driver.load(binary, device)
    return None


@cache
def _tell() -> None:
    """Once a process: it takes a core one to four seconds for each of some sixty (docs/speed.md)."""
    there = store.folder()
    kept = "and not kept, for want of a home" if there is None else f"which are kept in {there}"
    logging.getLogger(__name__).warning("compiling kernels for this GPU, %s", kept)


def _laid_open(arguments: Sequence[Any]) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _laid_open(argument)
        else:
            yield argument


def _kind(value: Any) -> Any:
    """What Triton compiles an argument by, or more."""
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % ALIGNED == 0
    if type(value) is int:
        return -(2**31) <= value < 2**31, value == 1, value % ALIGNED == 0
    return "none" if value is None else "float" if type(value) is float else UNKNOWN


def compiled(kernel: Any, arguments: int) -> Binary | None:
    """What Triton compiled, with so many arguments before what is compiled in; None where only it can launch that."""
    about = kernel.metadata
    scratch = [getattr(about, f"{kind}_scratch_size", 0) for kind in ("global", "profile")]
    if about.num_ctas != 1 or about.launch_cooperative_grid or any(scratch):
        return None
    types = list(_laid_open(tuple(kernel.src.signature.values())[:arguments]))
    if not all(kind in HANDED_OVER or kind.startswith("*") for kind in types):
        return None
    takes = tuple(HANDED_OVER.get(kind, "Q") for kind in types)
    return Binary(about.name, about.shared, about.num_warps, bool(about.launch_pdl), takes, kernel.asm["cubin"])
