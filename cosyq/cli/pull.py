"""cosyq pull: an artifact of the Hub as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cosyq.cli.console import DEFAULT_FOLDER, Json, emit, note


def pull(
    reference: Annotated[str, typer.Argument(metavar="REPO[@REV]", help="OWNER/NAME, at a branch, tag or commit.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The folder; else artifacts/NAME.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing artifact.")] = False,
    as_json: Json = False,
) -> None:
    """Fetch an artifact, check every hash, and put it in a folder."""
    from cosyq.publish.pull import parse
    from cosyq.publish.pull import pull as fetch

    repo, _ = parse(reference)
    target = output or DEFAULT_FOLDER / repo.rpartition("/")[2]
    snapshot = fetch(reference, target, force=force)
    if as_json:
        emit({"artifact": str(target), "repo": repo, "commit": snapshot.commit, "reference": snapshot.reference})
        return
    note(f"{snapshot.reference}: every file is what the manifest says")
    print(target)
