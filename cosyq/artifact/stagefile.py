"""A safetensors file written tensor by tensor, in any order, at places that are known beforehand.

The library's writer wants all tensors in memory at once; a plan knows every dtype and shape before the first
is packed, so the header comes first and each tensor goes straight to its offset. Reading is the library's, but
for bytes that are on a GPU already.
"""

from __future__ import annotations

import hashlib
import json
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cosyq.quantize.formats import Specs

DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
}
MAX_HEADER = 100 << 20  # the format's own limit


def header_bytes(tensors: Specs, metadata: dict[str, str]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The file's first bytes, and each tensor's place in the file.

    Wider types come first, so that every tensor is aligned to its own width; equal input, equal bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset, places = 0, {}
    for name in sorted(tensors, key=lambda n: (-tensors[n][0].itemsize, n)):
        dtype, shape = tensors[name]
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        places[name] = (offset, size)
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: (start + o, s) for n, (o, s) in places.items()}


class StageFileWriter:
    """Use as a context manager; on a clean exit every tensor must have been written."""

    def __init__(self, path: Path, tensors: Specs, metadata: dict[str, str]):
        self.path, self.tensors = path, tensors
        header, self._places = header_bytes(tensors, metadata)
        self.header_sha256 = hashlib.sha256(header).hexdigest()
        self._missing = set(tensors)
        self._file = path.open("xb")
        self._file.write(header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError when the tensor is not what the plan said."""
        dtype, shape = self.tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, the plan said {dtype} {list(shape)}")
        self._file.seek(self._places[name][0])
        self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def __enter__(self) -> StageFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"{self.path.name} lacks {sorted(self._missing)[:5]}")


def read_header(path: Path) -> tuple[dict[str, Any], str]:
    """The parsed header of a safetensors file and the sha256 of its bytes.

    Raises:
        ValueError: it has none.
    """
    with path.open("rb") as file:
        return _header(file)


def _header(file: BinaryIO) -> tuple[dict[str, Any], str]:
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > MAX_HEADER:
        raise ValueError("no safetensors header")
    text = file.read(length)
    if len(text) < length:
        raise ValueError("the header is cut off")
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    return header, hashlib.sha256(prefix + text).hexdigest()


def views(begin: Tensor, header: bytes, header_sha256: str | None) -> dict[str, Tensor]:
    """The tensors that lie whole in a file's first bytes [n] uint8, wherever those are, as views of them.

    Raises:
        ValueError: the header is another one, or does not say where they are.
    """
    entries, digest = _header(BytesIO(header))
    if digest != header_sha256:
        raise ValueError("another header")
    dtypes, found = {name: dtype for dtype, name in DTYPES.items()}, {}
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        try:
            dtype, shape, (first, last) = dtypes[entry["dtype"]], torch.Size(entry["shape"]), entry["data_offsets"]
            place = slice(len(header) + first, len(header) + last)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{name} has no {error}") from None
        if not 0 <= first <= last or last - first != shape.numel() * dtype.itemsize or place.start % dtype.itemsize:
            raise ValueError(f"{name} is out of place")
        if place.stop <= len(begin):
            found[name] = begin[place].view(dtype).view(shape)
    return found
