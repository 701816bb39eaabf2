"""Where files go, and how: one appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cosyq.errors import ArtifactError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary sibling to write, renamed to `path` when the block ends well, and gone when it does not.

    Raises:
        ArtifactError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise ArtifactError(f"cannot be written ({error.strerror or error})", where=path) from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def cache_folder(kind: str) -> Path:
    """Where the XDG Base Directory Specification has a program keep what it can make again."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(named) if os.path.isabs(named) else Path("~/.cache").expanduser()
    return base / "cosyq" / kind
