"""Every failure a user can cause or meet, as one tree: what went wrong, where, and what to do about it.

The exit code belongs to the class, so that the command line needs no table of its own:
2 usage or recipe, 3 checkpoint or artifact, 4 device or memory, 5 network or Hub. Anything that
is not a `CosyqError` is a bug of ours and exits with 1.
"""

from __future__ import annotations

from pathlib import Path


class CosyqError(Exception):
    """Base of all expected failures.

    Args:
        what: what was found and what was expected, without a trailing period.
        where: the file, key or tensor it concerns.
        remedy: what the reader can do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | Path | None = None, remedy: str | None = None):
        self.what = what
        self.where = str(where) if where is not None else None
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        if self.remedy:
            line = f"{line}; {self.remedy}"
        return " ".join(line.split())  # one line, whatever a nested message brought along


class UsageError(CosyqError):
    """The command, the text, the voice or an option is not usable as given."""

    exit_code = 2


class RecipeError(CosyqError):
    """A recipe that cannot be read, is not valid, or does not fit the model."""

    exit_code = 2


class CheckpointError(CosyqError):
    """A source checkpoint that is missing, damaged, or not the published layout."""

    exit_code = 3


class ArtifactError(CosyqError):
    """An artifact or voice that is missing, damaged, too new, or cannot be written."""

    exit_code = 3


class DeviceError(CosyqError):
    """No such device, not enough memory on it, or arithmetic that left the finite numbers."""

    exit_code = 4


class NetworkError(CosyqError):
    """The Hub could not be reached or refused."""

    exit_code = 5


class ReaderGoneError(CosyqError):
    """Who read our standard output closed it; there is nothing more to do, and nothing to report."""

    exit_code = 141
