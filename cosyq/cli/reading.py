"""Where text comes from: the command line, a file, or stdin, whole or as it arrives."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO

from cosyq.errors import UsageError

MAX_BYTES = 1 << 20
READ_SIZE = 1 << 16


def read_text(text: str | None, file: Path | None) -> str:
    """The text as given, of stdin where it is `-`, or of the file.

    Raises:
        UsageError: it cannot be read, is too long, or is no UTF-8.
    """
    if text is not None and text != "-":
        return text
    where = "stdin" if file is None else str(file)
    with open_input(file) as source:
        data = source.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UsageError(f"more than {MAX_BYTES} bytes", where=where, remedy="give it in parts")
    return "".join(_decoded(iter([data]), where))


def arriving_stdin() -> Iterator[str]:
    """What stdin has, as soon as it has something, up to its end.

    Raises:
        UsageError: it is no UTF-8.
    """
    return _decoded(iter(lambda: os.read(sys.stdin.fileno(), READ_SIZE), b""), "stdin")


def open_input(file: Path | None) -> AbstractContextManager[BinaryIO]:
    """The file, or stdin.

    Raises:
        UsageError: it cannot be opened.
    """
    if file is None:
        return nullcontext(sys.stdin.buffer)
    try:
        return file.open("rb")
    except OSError as error:
        raise UsageError(f"cannot be read ({error.strerror})", where=file) from None


def _decoded(data: Iterator[bytes], where: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for part in data:
            yield decoder.decode(part)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise UsageError("not valid UTF-8", where=where) from None
