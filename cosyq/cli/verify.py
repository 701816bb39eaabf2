"""cosyq verify: is an artifact whole, is it what the Hub has, and is it made from this checkpoint?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cosyq.cli.console import ArtifactArgument, Json, choose_artifact, emit, note, print_table, progress_bar

WORST = 10


def verify(
    artifact: ArtifactArgument,
    against: Annotated[Path | None, typer.Option(help="The checkpoint's folder it was made from.")] = None,
    hub: Annotated[
        str | None, typer.Option(metavar="REPO[@REV]", help="What it was pushed to or pulled from; of hf:// itself.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hash every file of an artifact, and compare with the Hub's own hashes where it is of the Hub.

    With --against, measure every module's error against the checkpoint.
    """
    from cosyq.artifact.reader import open_artifact
    from cosyq.audit import measure_errors, verify_artifact

    folder = choose_artifact(artifact)
    opened = open_artifact(folder)
    verify_artifact(opened)
    origin = None
    if reference := hub or _pinned(artifact, folder):
        from cosyq.publish.origin import verify_origin

        origin = verify_origin(folder, reference)
    errors = []
    if against is not None:
        with progress_bar("comparing") as progress:
            errors = sorted(measure_errors(opened, against, progress), key=lambda e: -e.measured)
    if as_json:
        worst = [{"module": e.name, "rms_error": e.measured, "recorded": e.recorded} for e in errors[:WORST]]
        about = {"artifact": artifact, "files": len(opened.manifest.files), "hub": origin.reference if origin else None}
        emit(about | {"worst": worst})
        return
    note(f"{artifact}: {len(opened.manifest.files)} files are what the manifest says")
    if origin:
        note(f"{origin.files} files are what the Hub says of {origin.reference}")
    if errors:
        rows = [[e.name, f"{e.measured:.4%}", f"{e.recorded:.4%}"] for e in errors[:WORST]]
        print_table("largest errors", ["module", "measured", "recorded"], rows)


def _pinned(artifact: str, folder: Path) -> str | None:
    """The commit that an artifact of the Hub was found at, which names the folder of its cache."""
    return f"{artifact.partition('@')[0]}@{folder.name}" if artifact.startswith("hf://") else None
