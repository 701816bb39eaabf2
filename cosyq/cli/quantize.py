"""cosyq quantize: recipe and checkpoint in, artifact out."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosyq.cli.console import Device, Json, emit, host_peak, megabytes, note, print_table, progress_bar
from cosyq.errors import RecipeError

if TYPE_CHECKING:
    from cosyq.artifact.manifest import Manifest
    from cosyq.eval.evaluation import Evaluation


def quantize(
    recipe: Annotated[str, typer.Argument(help="A recipe's path, or the name of a shipped one.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The artifact's folder.")] = None,
    source: Annotated[str | None, typer.Option(help="A checkpoint's folder, or REPO@REVISION on the Hub.")] = None,
    device: Device = "auto",
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be packed how, and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing artifact.")] = False,
    as_json: Json = False,
) -> None:
    """Quantize a checkpoint into an artifact, as a recipe says."""
    from cosyq.recipe import find_recipe, load_recipe

    path = find_recipe(recipe)
    changes = [*(overrides or []), *(source_override(source) if source else [])]
    loaded = load_recipe(path, changes)
    if loaded.gate:
        from cosyq.eval import gate

        gate.check(loaded)
    target = output or (Path(loaded.output) if loaded.output else Path("artifacts") / loaded.name)

    started = time.perf_counter()
    from cosyq import build
    from cosyq.artifact.writer import check_output
    from cosyq.calibrate.run import calibrate
    from cosyq.runtime.engine import pick_device

    place = pick_device(device)
    if not dry_run:
        check_output(target, force=force)
    if loaded.source.repo is not None:
        note(f"source: {loaded.source.repo}@{loaded.source.revision}")  # the Hub's client may try for half a minute
    prepared = build.prepare(loaded, path.read_text("utf-8"))
    decisions = [decision for stage in prepared.plan.values() for decision in stage]
    if dry_run:
        if as_json:
            modules = [
                {"module": d.module.name, "rule": d.rule, "format": str(d.format), "bytes": d.bytes} for d in decisions
            ]
            emit({"modules": modules, "bytes": prepared.bytes})
        else:
            rows = [[d.module.name, d.rule, str(d.format), str(d.bytes)] for d in decisions]
            print_table(f"{loaded.name}: {megabytes(prepared.bytes)}", ["module", "rule", "format", "bytes"], rows)
        return

    def pack(folder: Path, *, force: bool) -> Manifest:
        with progress_bar("calibrating", unit="items") as progress:
            calibrated = calibrate(prepared, place, progress)
        with progress_bar("packing") as progress:
            return build.run(prepared, folder, place, force=force, progress=progress, calibrated=calibrated)

    evaluation = None
    if loaded.gate:
        from cosyq.eval import gated

        manifest, evaluation = gated.run(prepared.recipe, pack, target, place, force=force, bar=progress_bar)
    else:
        manifest = pack(target, force=force)
    seconds = time.perf_counter() - started
    size = sum(record.bytes for record in manifest.files.values())
    worst = max(manifest.modules, key=lambda record: record.rms_error)
    if as_json:
        emit(
            {
                "artifact": str(target),
                "bytes": size,
                "seconds": round(seconds, 3),
                "peak_host_bytes": host_peak(),
                "device": manifest.device,
                "recipe_sha256": manifest.recipe_sha256,
                "largest_error": {"module": worst.name, "rms_error": worst.rms_error},
                "gate": None if evaluation is None else _gated(loaded.gate, evaluation),
            }
        )
        return
    note(f"{megabytes(size)} in {seconds:.1f} s on {manifest.device}")
    note(f"largest error {worst.rms_error:.2%} ({worst.name})")
    if evaluation is not None:
        note(f"kept to its gate: {', '.join(loaded.gate)}")
    print(target)


def _gated(limits: Iterable[str], evaluation: Evaluation) -> dict[str, Any]:
    """The metrics that there was a limit on: what let it through."""
    found = {finding.metric.key: finding for finding in evaluation.findings}
    sides = ("artifact", "difference")
    return {key: {side: asdict(getattr(found[key], side)) for side in sides} for key in limits}


def source_override(source: str) -> list[str]:
    """A --source as changes to the recipe: what it pinned was for another source."""
    nothing = [f"source.{key}=null" for key in ("repo", "revision", "path", "bundled")]
    changes = [*nothing, "source.sha256={}"]
    if Path(source).is_dir() or "/" not in source.strip("/") or source.startswith((".", "/", "~")):
        return [*changes, f"source.path={Path(source).expanduser()}"]
    repo, at, revision = source.partition("@")
    if not at:
        where = f"--source {source}"
        raise RecipeError("names a repository without a revision", where=where, remedy="use REPO@REVISION")
    return [*changes, f"source.repo={repo}", f"source.revision={revision}"]
