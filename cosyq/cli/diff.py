"""cosyq diff: what two artifacts hold differently."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosyq.cli.console import Json, choose_artifact, emit, note, print_table, progress_bar

if TYPE_CHECKING:
    from cosyq.artifact.compare import Difference, Held


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="An artifact's folder, or hf://REPO[@REV].")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    as_json: Json = False,
) -> None:
    """Show the modules that two artifacts hold differently: formats, bytes, error of B against A, worst first."""
    from cosyq.artifact.compare import beside, differences
    from cosyq.artifact.reader import open_artifact

    a, b = (open_artifact(choose_artifact(name)) for name in (first, second))
    others = beside(a.manifest, b.manifest)
    with progress_bar("comparing") as progress:
        found = sorted(differences(a, b, progress), key=_worst_first)
    if as_json:
        modules = [{"module": d.module, "a": _held(d.first), "b": _held(d.second), "rms_error": d.error} for d in found]
        emit({"same": not (found or others), "modules": modules, "beside": others})
        return
    for what, (mine, other) in others.items():
        note(f"{what}: {mine} | {other}")
    rows = [
        [d.module, *(text for held in (d.first, d.second) for text in _cells(held)), _percent(d.error)] for d in found
    ]
    print_table(f"{first} | {second}", ["module", "format A", "bytes A", "format B", "bytes B", "error"], rows)
    note(f"{len(found)} of {len(a.manifest.modules)} modules differ")


def _worst_first(difference: Difference) -> tuple[bool, float]:
    return difference.error is not None, -(difference.error or 0.0)


def _held(held: Held | None) -> dict[str, Any] | None:
    return None if held is None else {"format": held.format, "bytes": held.bytes}


def _cells(held: Held | None) -> list[str]:
    return ["none", "0"] if held is None else [held.format, str(held.bytes)]


def _percent(error: float | None) -> str:
    return "none" if error is None else f"{error:.4%}"
