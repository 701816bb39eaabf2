"""Writing an artifact: in a sibling folder, renamed at the end, so that it appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cosyq.errors import ArtifactError

REJECTED = ".rejected"  # ends the name of a folder whose artifact a gate refused
MARGIN = 16 << 20  # manifest, tokenizer and voices beside the planned tensors


def passed(folder: Path) -> bool:
    """Whether an artifact's folder is not one still being made, nor one that a gate refused."""
    return not folder.name.startswith(".") and not folder.name.endswith(REJECTED)


def check_output(output: Path, *, force: bool) -> None:
    """Raises ArtifactError when `output` exists and may not be replaced."""
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise ArtifactError("exists already", where=output, remedy="give another -o, or --force to replace it")
    if not (output / "manifest.json").is_file() and not _is_empty_folder(output):
        raise ArtifactError("is not an artifact and will not be replaced", where=output)


def check_room(output: Path, needed: int) -> None:
    """Raises ArtifactError when the disk cannot hold `needed` bytes more."""
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed + MARGIN:
        raise ArtifactError(f"{(needed + MARGIN) / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free", where=parent)


@contextmanager
def new_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """A temporary sibling of `output` that takes its place when the block ends well, and is gone when it does not.

    Raises:
        ArtifactError: the disk is full or refuses.
    """
    check_output(output, force=force)
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    retired = output.parent / f".{output.name}.old-{os.getpid()}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        check_output(output, force=force)
        if output.exists():
            output.rename(retired)
        try:
            partial.rename(output)
        except BaseException:
            if retired.exists():
                retired.rename(output)
            raise
        shutil.rmtree(retired, ignore_errors=True)
    except OSError as error:
        raise ArtifactError(f"cannot be written ({error.strerror or error})", where=output) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
