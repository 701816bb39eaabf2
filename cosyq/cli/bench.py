"""cosyq bench: how fast an artifact speaks here."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cosyq.bench import PARTS, Part
from cosyq.cli.console import (
    ArtifactOption,
    Device,
    DtypeOption,
    EngineOption,
    Json,
    choose_artifact,
    emit,
    note,
    print_table,
    status_line,
)
from cosyq.errors import UsageError
from cosyq.files import whole_file
from cosyq.publish.reports import BENCH_FILE
from cosyq.server import REMEDY, missing, require_packages

MOST_STREAMS = 256
ALL = "all"


def bench(
    artifact: ArtifactOption = None,
    random: Annotated[
        Literal["full", "small"] | None,
        typer.Option(help="Random weights of the published model's size instead, or a few MB: nothing is downloaded."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="What packs random weights: a recipe; else int8.")] = None,
    voice: Annotated[str | None, typer.Option("-v", "--voice", help="A voice's name or file.")] = None,
    parts: Annotated[
        str, typer.Option(metavar="NAME,...", help="Of llm, flow, vocoder, speech, streams, serve and cold; or all.")
    ] = "llm,flow,vocoder,speech",
    streams: Annotated[
        str, typer.Option(metavar="N,...", help="How many at once, in the parts streams and serve.")
    ] = "1,4,16",
    seconds: Annotated[int, typer.Option(min=1, max=60, help="Of audio: a stage by itself, speech whole.")] = 10,
    runs: Annotated[
        int | None,
        typer.Option(
            min=1, max=1000, help="How often; else 7 times on a GPU, 3 on a CPU, streams and serve 3 and once."
        ),
    ] = None,
    flow_steps: Annotated[int | None, typer.Option(help="Euler steps, if the artifact has several.")] = None,
    engine: EngineOption = "auto",
    device: Device = "auto",
    dtype: DtypeOption = "auto",
    save: Annotated[
        bool, typer.Option("--save", help="Keep it as bench.json in the artifact, for the card of a push.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure how fast an artifact speaks on this machine, beside what the machine could do at best.

    The stages by themselves (llm, flow, vocoder), an utterance whole and a sentence streamed (speech), several requests
    at once (streams), the same over HTTP with what that adds to a request (serve, which brings streams along), and new
    processes (cold). With cosyq-mini on two cores the default's parts take half a minute, streams one minute more,
    serve several and cold half of one. The published model takes no longer on a GPU, and on a CPU tens of times as
    long: name parts there, and --runs 1. --random full takes 4.2 GB of a temporary folder for its time, and half a
    minute on a GPU machine, minutes on two cores; to keep it, use `cosyq checkpoint random` and `cosyq quantize`.
    """
    chosen, counts = _parts(parts), _streams(streams)
    _check(artifact, random, recipe, save=save)
    with ExitStack() as stack:
        say = stack.enter_context(status_line())
        say("starting")
        from cosyq.artifact.reader import open_artifact
        from cosyq.bench.report import to_json
        from cosyq.bench.run import Wanted
        from cosyq.bench.run import bench as measure
        from cosyq.runtime.engine import pick_device, pick_engine

        place = pick_device(device)
        pick_engine(engine, place)
        if random is None:
            folder = choose_artifact(artifact, to_change=save)
        else:
            from cosyq.bench.chance import random_artifact

            folder = stack.enter_context(random_artifact(random, recipe or "int8", flow_steps, place, say))
        wanted = Wanted(chosen, voice, flow_steps, engine, device, dtype, seconds, runs, counts)
        found = to_json(measure(open_artifact(folder), wanted, say))
    if save:
        _keep(folder, found)
    if as_json:
        emit(found)
        return
    note(found["about"])
    print_table(found["artifact"], found["columns"], found["rows"])


def _parts(given: str) -> frozenset[Part]:
    names = {name.strip() for name in given.split(",")}
    if names == {ALL}:
        if gone := missing():
            note(f"the part serve is left out: {', '.join(gone)} not here; {REMEDY}")
        return frozenset(part for part in PARTS if part != "serve" or not gone)
    if unknown := names - set(PARTS):
        raise UsageError("no such part", where=", ".join(sorted(unknown)), remedy=f"there are: {', '.join(PARTS)}, all")
    if "serve" in names:
        require_packages()
    return frozenset(part for part in PARTS if part in names)


def _streams(given: str) -> tuple[int, ...]:
    counts = [int(word) if re.fullmatch(" *[0-9]{1,4} *", word) else 0 for word in given.split(",")]
    if not all(1 <= count <= MOST_STREAMS for count in counts):
        raise UsageError(f"expected numbers from 1 to {MOST_STREAMS}, as in 1,4,16", where=f"--streams {given}")
    return tuple(counts)


def _check(artifact: str | None, random: str | None, recipe: str | None, *, save: bool) -> None:
    if random is not None and artifact is not None:
        raise UsageError("give an artifact or random weights, not both", where="--random")
    if random is not None and save:
        raise UsageError("random weights are not kept, nor would a report be", where="--save", remedy="use --json")
    if random is None and recipe is not None:
        raise UsageError("an artifact is packed already", where="--recipe", remedy="use it with --random")


def _keep(folder: Path, found: dict[str, Any]) -> None:
    with whole_file(folder / BENCH_FILE) as partial:
        partial.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", "utf-8")
