"""One file of named tensors, .pt or .safetensors, read lazily and without trust.

A .pt is a pickle in a zip: it is opened with `weights_only`, so nothing but tensors can come out, and mapped
into memory, so that only what is used is read.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cosyq.errors import CheckpointError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is asked for. `names` are the source tensors it is made from."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def open_tensors(path: Path) -> dict[str, LazyTensor]:
    """Every tensor of `path` by name.

    Raises:
        CheckpointError: the file is missing, damaged, or holds anything but float tensors.
    """
    if not path.is_file():
        raise CheckpointError("no such file", where=path, remedy="is this the folder of a checkpoint?")
    tensors = _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
    size = path.stat().st_size
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"tensor {name} is {tensor.dtype}, expected a float type", where=path)
        if torch.Size(tensor.shape).numel() * tensor.dtype.itemsize > size:
            raise CheckpointError(f"tensor {name} claims shape {list(tensor.shape)}, more than the file", where=path)
    return tensors


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    try:
        handle = safe_open(path, framework="pt")
        tensors = {}
        for name in handle.keys():  # noqa: SIM118 (not a mapping)
            tensor = handle.get_tensor(name)  # a view of the mapped file
            tensors[name] = LazyTensor((name,), tuple(tensor.shape), tensor.dtype, partial(_as_it_is, tensor))
        return tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"not a readable safetensors file ({error})", where=path) from None


def _open_pickle(path: Path) -> dict[str, LazyTensor]:
    remedy = "download it again, or ask its author for a plain state dict"
    if not zipfile.is_zipfile(path):
        raise CheckpointError("truncated, or not a .pt file of this century", where=path, remedy=remedy)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            "holds pickled objects other than tensors and was not loaded", where=path, remedy=remedy
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"damaged .pt file ({first[:160]})", where=path, remedy=remedy) from None
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"holds a {type(state).__name__}, expected named tensors", where=path, remedy=remedy)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            found = type(value).__name__
            raise CheckpointError(f"entry {name!r} is a {found}, expected a tensor", where=path, remedy=remedy)
    return {k: LazyTensor((k,), tuple(v.shape), v.dtype, partial(_as_it_is, v)) for k, v in state.items()}


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
