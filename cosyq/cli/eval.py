"""cosyq eval: what an artifact lost, against the checkpoint it was made from or against another artifact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
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
from cosyq.cli.voice import encoders_folder
from cosyq.errors import CheckpointError, NetworkError, UsageError

if TYPE_CHECKING:
    import torch

    from cosyq.artifact.manifest import Manifest
    from cosyq.artifact.reader import Artifact
    from cosyq.eval.evaluation import Evaluation
    from cosyq.eval.likeness import Likeness
    from cosyq.eval.metric import Finding, Interval
    from cosyq.eval.opinion import Opinion
    from cosyq.eval.recognizers import Recognizer
    from cosyq.eval.seedtts import Line, Prompts

OWN_ALOUD = 32  # of cosyq's own texts that both say, where no limit is given: it takes longer than all else


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
        str | None, typer.Option(help="Of cosyq's own texts, only the en or zh ones; of others, what they are in.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many texts, from all of the list.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 62) - 1, help="Of the utterances that are compared.")] = 0,
    spoken: Annotated[bool, typer.Option("--spoken", help="Let both say texts by themselves, too.")] = False,
    recognizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:WHAT]",
            help="Count the words understood, by pocketsphinx, whisper[:DIR], transformers:DIR or command:PROGRAM.",
        ),
    ] = None,
    mos: Annotated[bool, typer.Option("--mos", help="Predict listeners' opinion with DistillMOS.")] = False,
    test_list: Annotated[
        Path | None,
        typer.Option("--list", help="Say a list of SEED-TTS-eval's, each line like its recording; spoken alone."),
    ] = None,
    sequences: Annotated[
        Path | None, typer.Option(help="Where to keep what the reference said; else in the user's cache.")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"], typer.Option(help="Of both sides' matrix products; fp32 adds no error.")
    ] = "fp32",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="An HTML page with all of it, and the sound.")
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep it as eval.json in the artifact, for its card.")] = False,
    as_json: Json = False,
) -> None:
    """Measure what an artifact lost, stage by stage, with intervals; without chance, on what the reference says.

    --recognizer, --mos and --list let both speak by themselves as well: what came of it in words, voice and sound.
    """
    folder = choose_artifact(artifact, to_change=save)
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise UsageError("no file can be written there", where=output, remedy="name one, such as report.html")
    if texts is not None and test_list is not None:
        raise UsageError("one of them names the texts, not both", where="--texts, --list")
    given = None if texts is None else _lines(read_text(None, texts), texts)

    from cosyq.artifact.reader import open_artifact
    from cosyq.eval import run
    from cosyq.eval.page import write_page
    from cosyq.eval.record import RECORD_FILE, write_record
    from cosyq.eval.scoring import BY_WORDS
    from cosyq.eval.seedtts import AS_PUBLISHED, read_list
    from cosyq.eval.sentences import own_texts, spread
    from cosyq.eval.spoken import Aloud, Judges
    from cosyq.eval.stages import Arithmetic
    from cosyq.runtime.engine import pick_device, pick_dtype
    from cosyq.sequences import artifact_voices

    opened, place = open_artifact(folder), pick_device(device)
    source = None if against is None or _is_artifact(against) else against  # of encoders
    lines = [] if test_list is None else read_list(test_list, limit)
    own = given is None and not lines
    said = [line.text for line in lines] or spread(given or own_texts(opened.manifest.bundled, language), limit)
    voices = artifact_voices(opened, len(said))
    aloud = None
    if spoken or recognizer or mos or lines:
        scoring = AS_PUBLISHED if lines else BY_WORDS
        judges = Judges(*_listeners(opened, source, str(place), recognizer, mos), None if own else language, scoring)
        judges.check(said)
        aloud = Aloud(said, _prompts(opened, source, lines) if lines else voices, judges)
        if own and limit is None:
            aloud = replace(aloud, texts=spread(said, OWN_ALOUD))
    with _reference(opened.manifest, against, place) as reference, progress_bar("measuring", unit="items") as progress:
        found = run.evaluate(
            opened,
            reference,
            [] if lines else said,
            voices,
            seed=seed,
            arithmetic=Arithmetic(place, pick_dtype(dtype, place)),
            progress=progress,
            sequences=sequences,
            aloud=aloud,
        )
    written: dict[str, Any] = {}
    if save:
        write_record(folder / RECORD_FILE, found)
        written["saved"] = str(folder / RECORD_FILE)
    if output is not None:
        write_page(output, found)
        written["page"] = str(output)
    if as_json:
        size = sum(record.bytes for record in opened.manifest.files.values())
        emit(_report(found) | written | {"bytes": size, "peak_memory_bytes": peak_memory(place)})
        return
    note(found.about)
    for seat, name in found.extra.items():
        note(f"{seat}: {name}")
    columns = ["metric", "unit", "artifact", "reference", "difference", "items", "for its claim"]
    print_table(f"{found.artifact} | {found.against}", columns, [_row(finding) for finding in found.findings])


def _lines(text: str, where: Path) -> list[str]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UsageError("holds no text", where=where, remedy="give one a line")
    return lines


def _prompts(opened: Artifact, source: str | None, lines: list[Line]) -> Prompts:
    from cosyq.eval.seedtts import Prompts
    from cosyq.voices.enrol import Encoders

    with progress_bar("reading prompts", unit="items") as progress:
        return Prompts(lines, Encoders(encoders_folder(opened, source)), opened.manifest.model.flow, progress)


def _listeners(
    opened: Artifact, source: str | None, device: str, recognizer: str | None, mos: bool
) -> tuple[Recognizer | None, Opinion | None, Likeness | None]:
    """Those that were asked for, and the checkpoint's speaker encoder where it is to be had."""
    from cosyq.eval import recognizers
    from cosyq.eval.likeness import Likeness
    from cosyq.eval.opinion import Opinion
    from cosyq.voices.enrol import SPEAKER_ENCODER

    named = recognizers.recognizer(recognizer, device) if recognizer else None
    opinion = Opinion() if mos else None
    try:
        return named, opinion, Likeness(encoders_folder(opened, source, [SPEAKER_ENCODER]))
    except (CheckpointError, NetworkError) as error:
        note(f"without speaker similarity: {error}")
        return named, opinion, None


def _is_artifact(against: str) -> bool:
    from cosyq.artifact.manifest import FILE_NAME

    return against.startswith("hf://") or (Path(against) / FILE_NAME).is_file()


@contextmanager
def _reference(manifest: Manifest, against: str | None, device: torch.device) -> Iterator[Artifact]:
    """The artifact to measure against: the one that is named, or a checkpoint in float32, for as long as needed."""
    from cosyq.artifact.reader import open_artifact
    from cosyq.lossless import lossless, recipe_against

    if against is not None and _is_artifact(against):
        yield open_artifact(choose_artifact(against))
        return
    recipe = recipe_against(manifest, _source(manifest, against))
    with ExitStack() as stack:
        with progress_bar("reading the checkpoint") as progress:
            reference = stack.enter_context(lossless(recipe, device, progress))
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
        "judges": found.extra,
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
