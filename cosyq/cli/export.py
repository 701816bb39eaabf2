"""cosyq export: parts of an artifact, for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cosyq.cli.console import ArtifactArgument, Json, choose_artifact, emit, note

app = typer.Typer(help="Parts of an artifact, for other programs.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    pass


@app.command("hf")
def hf(
    artifact: ArtifactArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write; it must not exist.")],
    as_json: Json = False,
) -> None:
    """Write the language model as a folder that transformers loads, with bitsandbytes where it is packed."""
    from cosyq.artifact.reader import open_artifact
    from cosyq.export import export_llm

    export_llm(open_artifact(choose_artifact(artifact)), output)
    size = sum(path.stat().st_size for path in output.iterdir())
    if as_json:
        emit({"output": str(output), "bytes": size})
        return
    note(f"{size / 1e6:,.1f} MB; README.md there says how to use it")
    print(output)
