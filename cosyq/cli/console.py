"""What all commands share: where output goes, and options that mean the same everywhere.

Data goes to stdout, everything else to stderr; with `--json`, stdout is one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cosyq.errors import ArtifactError, CosyqError, DeviceError, UsageError

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
EngineName = Literal["auto", "fused", "fused8", "cpu", "reference", "unpacked", "bnb"]
DtypeName = Literal["auto", "bf16", "fp16", "fp32"]
EngineOption = Annotated[
    EngineName, typer.Option(help="What multiplies; reference, unpacked and bnb are to compare with.")
]
DtypeOption = Annotated[DtypeName, typer.Option(help="Of matrix products.")]
ArtifactOption = Annotated[
    str | None,
    typer.Option(
        "-a",
        "--artifact",
        help="An artifact's folder, or hf://REPO[@REV]; else $COSYQ_ARTIFACT, else the newest in artifacts/.",
    ),
]
ArtifactArgument = Annotated[str, typer.Argument(help="An artifact's folder, or hf://REPO[@REV].")]
DEFAULT_FOLDER = Path("artifacts")


def note(message: str) -> None:
    """A line for a person, on stderr."""
    print(message, file=sys.stderr, flush=True)


def emit(data: dict[str, Any]) -> None:
    """The command's result, as JSON on stdout."""
    print(json.dumps(data, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))


def expect(error: Exception) -> CosyqError:
    """What a user is told of a failure: an expected one as it is, memory that ran out, or a bug of ours."""
    if os.environ.get("COSYQ_DEBUG") == "1":
        traceback.print_exception(error)
    if isinstance(error, CosyqError):
        return error
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return DeviceError("out of memory", where="device", remedy="choose a smaller recipe or a shorter text")
    return CosyqError(f"internal error: {type(error).__name__}: {error} (COSYQ_DEBUG=1 shows where)")


def choose_artifact(given: str | None, *, to_change: bool = False) -> Path:
    """The artifact's folder: as given, from the environment, or the newest under artifacts/, which is then named.

    One of the Hub is fetched into the cache, unless it is there, and named with its commit.

    Raises:
        ArtifactError: there is none.
        NetworkError: it cannot be fetched.
        UsageError: one of the Hub is to be changed, or its reference is none.
    """
    if named := given or os.environ.get("COSYQ_ARTIFACT"):
        return _fetched(named, to_change) if named.startswith("hf://") else Path(named)
    if not (found := made_artifacts()):
        raise ArtifactError(
            "no artifact there", where=DEFAULT_FOLDER, remedy="make one with `cosyq quantize int8`, or name one with -a"
        )
    note(f"using {found[-1]}")
    return found[-1]


def made_artifacts() -> list[Path]:
    """The folders in artifacts/ that hold one, the newest last; none that is still being made or was refused."""
    from cosyq.artifact.writer import passed

    found = sorted(DEFAULT_FOLDER.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    return [path.parent for path in found if passed(path.parent)]


def _fetched(reference: str, to_change: bool) -> Path:
    from cosyq.publish.pull import locate

    if to_change:
        raise UsageError(
            "an artifact of the Hub is not changed in place", where=reference, remedy="`cosyq pull` makes a copy"
        )
    snapshot = locate(reference)
    note(f"using {snapshot.reference}")
    return snapshot.folder


@contextmanager
def progress_bar(title: str, *, unit: Literal["bytes", "items"] = "bytes") -> Iterator[Callable[..., None]]:
    """A callback (what, done, total or None) that draws a bar on a terminal, and is silent elsewhere."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeElapsedColumn(), TimeRemainingColumn())
    # stdout stays what it is: rich would send what is printed meanwhile to stderr with the bar.
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        task = progress.add_task(title)
        yield lambda what, done, total: progress.update(
            task, description=f"{title} {what:<44.44}", completed=done, total=total
        )


@contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """A callback that shows on a terminal what is being done, and is silent elsewhere.

    It draws when it is called and never in between: nothing runs beside what is being measured.
    """
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(stderr=True), auto_refresh=False, transient=True, redirect_stdout=False) as live:
        yield lambda what: live.update(Text(f"{what} ...", style="dim"), refresh=True)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; plain tab-separated lines where that is no terminal."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index and rows and rows[0][index][:1].isdigit() else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def peak_memory(device: Any) -> int:
    """Bytes: of the GPU what torch allocated at most, of the host the resident peak."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return host_peak()


def host_peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
