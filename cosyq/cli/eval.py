"""cosyq eval: what an artifact lost, against the checkpoint it was made from or against another artifact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cosyq.cli.console import (
    ArtifactArgument,
    Device,
    Json,
    choose_artifact,
    emit,
    note,
    peak_memory,
    print_table,
    progress_bar,
)
from cosyq.cli.reading import read_text
from cosyq.errors import UsageError

if TYPE_CHECKING:
    import torch

    from cosyq.artifact.manifest import Manifest
    from cosyq.artifact.reader import Artifact
    from cosyq.eval.evaluation import Evaluation
    from cosyq.eval.metric import Finding, Interval


def evaluate(
    artifact: ArtifactArgument,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE|ARTIFACT",
            help="A checkpoint, a folder or REPO@REV, or another artifact; else the checkpoint it was made from.",
        ),
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="Say these, one a line, in place of cosyq's own.")] = None,
    language: Annotated[
        Literal["en", "zh"] | None, typer.Option(help="Of cosyq's own texts, only these; cosyq-mini reads en alone.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many texts, from all of the list.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 62) - 1, help="Of the utterances that are compared.")] = 0,
    sequences: Annotated[
        Path | None, typer.Option(help="Where to keep what the reference said; else in the user's cache.")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"], typer.Option(help="Of both sides' matrix products; fp32 adds no error.")
    ] = "fp32",
    as_json: Json = False,
) -> None:
    """Measure what an artifact lost, stage by stage, with intervals; without chance, on what the reference says."""
    folder = choose_artifact(artifact)
    given = None if texts is None else _lines(read_text(None, texts), texts)

    from cosyq.artifact.reader import open_artifact
    from cosyq.eval import run
    from cosyq.eval.sentences import sentences, spread
    from cosyq.eval.stages import Arithmetic
    from cosyq.runtime.engine import pick_device, pick_dtype

    opened, place = open_artifact(folder), pick_device(device)
    if given is None:
        languages: tuple[Literal["en", "zh"], ...] = ("en",) if opened.manifest.bundled else ("en", "zh")
        given = [text for name in ([language] if language else languages) for text in sentences(name)]
    said = spread(given, limit)
    with _reference(opened.manifest, against, place) as reference, progress_bar("measuring", unit="items") as progress:
        found = run.evaluate(
            opened,
            reference,
            said,
            run.artifact_voices(opened, len(said)),
            seed=seed,
            arithmetic=Arithmetic(place, pick_dtype(dtype, place)),
            progress=progress,
            sequences=sequences,
        )
    if as_json:
        emit(_report(found) | {"peak_memory_bytes": peak_memory(place)})
        return
    note(found.about)
    columns = ["metric", "unit", "artifact", "reference", "difference", "items", "for its claim"]
    print_table(f"{found.artifact} | {found.against}", columns, [_row(finding) for finding in found.findings])


def _lines(text: str, where: Path) -> list[str]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UsageError("holds no text", where=where, remedy="give one a line")
    return lines


@contextmanager
def _reference(manifest: Manifest, against: str | None, device: torch.device) -> Iterator[Artifact]:
    """The artifact to measure against: the one that is named, or a checkpoint in float32, for as long as needed."""
    from cosyq.artifact.manifest import FILE_NAME
    from cosyq.artifact.reader import open_artifact
    from cosyq.lossless import lossless, recipe_against

    if against is not None and (against.startswith("hf://") or (Path(against) / FILE_NAME).is_file()):
        yield open_artifact(choose_artifact(against))
        return
    recipe = recipe_against(manifest, _source(manifest, against))
    with progress_bar("reading the checkpoint") as progress, lossless(recipe, device, progress) as reference:
        yield reference


def _source(manifest: Manifest, against: str | None) -> dict[str, Any] | None:
    """Where the checkpoint is, as a recipe's source has it; None is where the manifest says.

    Raises:
        UsageError: nobody says where.
    """
    if against is None:
        if manifest.bundled is None and manifest.source.repo is None:
            raise UsageError(
                "the artifact does not say where its checkpoint is", where=manifest.name, remedy="give --against DIR"
            )
        return None
    if Path(against).is_dir():
        return {"path": against}
    repo, at, revision = against.partition("@")
    if not at or "/" not in repo:
        remedy = "give a folder, an artifact, hf://REPO or a checkpoint's REPO@REV"
        raise UsageError("no such artifact and no such checkpoint", where=f"--against {against}", remedy=remedy)
    return {"repo": repo, "revision": revision}


def _report(found: Evaluation) -> dict[str, Any]:
    return {
        "artifact": found.artifact,
        "against": found.against,
        "about": found.about,
        "findings": {
            finding.metric.key: {
                "unit": finding.metric.unit,
                "artifact": asdict(finding.artifact),
                "reference": None if finding.reference is None else asdict(finding.reference),
                "difference": asdict(finding.difference),
                "items": finding.items,
                "claim": finding.metric.claim,
                "needed": finding.needed,
            }
            for finding in found.findings
        },
    }


def _row(finding: Finding) -> list[str]:
    reference = "" if finding.reference is None else _number(finding.reference.value)
    needed = "?" if finding.needed is None else str(finding.needed)
    return [
        finding.metric.key,
        finding.metric.unit,
        _interval(finding.artifact),
        reference,
        "" if finding.reference is None else _interval(finding.difference, sign="+"),
        str(finding.items),
        f"{needed} for {finding.metric.claim:g}",
    ]


def _interval(found: Interval, *, sign: Literal["+", "-"] = "-") -> str:
    return f"{_number(found.value, sign)} [{_number(found.low, sign)}, {_number(found.high, sign)}]"


def _number(value: float, sign: Literal["+", "-"] = "-") -> str:
    return f"{value:{sign}.4g}" if value else "0"
