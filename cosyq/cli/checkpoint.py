"""cosyq checkpoint: random ones in the published layout."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from cosyq.cli.console import Json, emit, megabytes, note

app = typer.Typer(help="Checkpoints in the published layout.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command("random")
def random(
    folder: Annotated[Path, typer.Argument(help="Where to write it; must not exist.")],
    size: Annotated[Literal["full", "small"], typer.Option(help="The model's own, or a few MB.")] = "full",
    seed: Annotated[int, typer.Option(min=0, help="Fixes every weight.")] = 0,
    as_json: Json = False,
) -> None:
    """Write a checkpoint of random weights: it makes noise, at the speed and size of the real one."""
    from cosyq.random_model import FULL, SMALL, write_random

    started = time.perf_counter()
    write_random(folder, FULL if size == "full" else SMALL, seed)
    count = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    seconds = time.perf_counter() - started
    if as_json:
        emit({"checkpoint": str(folder), "bytes": count, "seconds": round(seconds, 3)})
    else:
        note(f"{megabytes(count)} of random weights in {seconds:.1f} s: they make noise, not speech")
        print(folder)
