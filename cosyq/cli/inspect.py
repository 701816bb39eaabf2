"""cosyq inspect: what an artifact is."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from cosyq.cli.console import ArtifactArgument, Json, choose_artifact, emit, megabytes, note, print_table


def inspect(
    artifact: ArtifactArgument,
    tensors: Annotated[bool, typer.Option("--tensors", help="Every module, not only the stages.")] = False,
    as_json: Json = False,
) -> None:
    """Show what an artifact holds: stages, formats, sizes, errors and origin."""
    import json

    from cosyq.artifact.reader import open_artifact

    opened = open_artifact(choose_artifact(artifact))
    manifest = opened.manifest
    if as_json:
        emit(json.loads(manifest.to_json()) | {"voices": list(opened.voice_files())})
        return
    size = sum(record.bytes for record in manifest.files.values())
    origin = f"{manifest.source.repo}@{manifest.source.revision}" if manifest.source.repo else "a local checkpoint"
    note(f"{manifest.name}: {megabytes(size)}, from {origin}, packed on {manifest.device}")
    note(f"recipe {manifest.recipe_sha256[:12]}, voices: {', '.join(opened.voice_files()) or 'none'}")
    if tensors:
        rows = [
            [m.name, str(m.format), "x".join(map(str, m.shape)), str(m.bytes), f"{m.rms_error:.3%}", m.rule]
            for m in manifest.modules
        ]
        print_table(manifest.name, ["module", "format", "shape", "bytes", "error", "rule"], rows)
        return
    groups: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    worst: dict[tuple[str, str], float] = {}
    for module in manifest.modules:
        key = (module.name.partition(".")[0], str(module.format))
        groups[key] += module.bytes
        counts[key] += 1
        worst[key] = max(worst.get(key, 0.0), module.rms_error)
    rows = [[s, f, str(counts[s, f]), megabytes(groups[s, f]), f"{worst[s, f]:.3%}"] for s, f in groups]
    print_table(manifest.name, ["stage", "format", "modules", "bytes", "largest error"], rows)
