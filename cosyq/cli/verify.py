"""cosyq verify: is an artifact whole, and is it made from this checkpoint?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cosyq.cli.console import ArtifactArgument, Json, choose_artifact, emit, note, print_table, progress_bar

WORST = 10


def verify(
    artifact: ArtifactArgument,
    against: Annotated[Path | None, typer.Option(help="The checkpoint's folder it was made from.")] = None,
    as_json: Json = False,
) -> None:
    """Hash every file of an artifact; with --against, measure every module's error against the checkpoint."""
    from cosyq.artifact.reader import open_artifact
    from cosyq.audit import measure_errors, verify_artifact

    opened = open_artifact(choose_artifact(artifact))
    verify_artifact(opened)
    errors = []
    if against is not None:
        with progress_bar("comparing") as progress:
            errors = sorted(measure_errors(opened, against, progress), key=lambda e: -e.measured)
    if as_json:
        worst = [{"module": e.name, "rms_error": e.measured, "recorded": e.recorded} for e in errors[:WORST]]
        emit({"artifact": artifact, "files": len(opened.manifest.files), "worst": worst})
        return
    note(f"{artifact}: {len(opened.manifest.files)} files are what the manifest says")
    if errors:
        rows = [[e.name, f"{e.measured:.4%}", f"{e.recorded:.4%}"] for e in errors[:WORST]]
        print_table("largest errors", ["module", "measured", "recorded"], rows)
