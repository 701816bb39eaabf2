"""A build that its recipe's gate judges: packed, measured against its full-precision self, and only then put in place.

What is refused is kept beside the output, with all that was found, and the output is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from cosyq import build
from cosyq.artifact.manifest import Manifest
from cosyq.artifact.reader import Artifact, open_artifact
from cosyq.artifact.writer import REJECTED, check_output, new_folder
from cosyq.errors import ArtifactError
from cosyq.eval import gate
from cosyq.eval.evaluation import Evaluation
from cosyq.eval.likeness import Likeness
from cosyq.eval.metrics import SIMILARITY, SPOKEN, TIMBRE
from cosyq.eval.opinion import Opinion
from cosyq.eval.page import write_page
from cosyq.eval.recognizers import recognizer
from cosyq.eval.record import RECORD_FILE, write_record
from cosyq.eval.run import evaluate
from cosyq.eval.sentences import own_texts, spread
from cosyq.eval.spoken import Aloud, Judges
from cosyq.eval.stages import Arithmetic
from cosyq.hub.snapshot import fetch
from cosyq.lossless import lossless, recipe_against
from cosyq.recipe import Recipe
from cosyq.sequences import artifact_voices
from cosyq.voices.enrol import SPEAKER_ENCODER

PAGE_FILE = "report.html"
Bar = Callable[..., AbstractContextManager[Callable[..., None]]]  # (title, unit="bytes"|"items") -> progress
Pack = Callable[..., Manifest]  # (folder, force=) -> what was written there, as `build.run` does


def run(
    recipe: Recipe, pack: Pack, output: Path, device: torch.device, *, force: bool, bar: Bar
) -> tuple[Manifest, Evaluation]:
    """Pack, measure and judge; an artifact that passes has `eval.json` beside its manifest.

    One that does not is at `OUTPUT.rejected`, in place of any before, with `eval.json` and `report.html`.

    Args:
        recipe: the one that `pack` packs, prepared.

    Raises:
        UsageError: a judge is not installed, or does not know the texts' language.
        ArtifactError: the gate refuses it; and as `build.run`.
        CheckpointError, DeviceError, NetworkError: as `build.run` and `evaluate`.
    """
    aside = output.with_name(output.name + REJECTED)
    check_output(output, force=force)
    check_output(aside, force=True)
    texts = spread(own_texts(recipe.source.bundled, recipe.evaluate.language), recipe.evaluate.sequences)
    judges = _judges(recipe, device)
    if judges is not None:
        judges.check(texts)
    with new_folder(output, force=force) as folder:
        manifest = pack(folder, force=True)
        evaluation = _measure(recipe, open_artifact(folder), texts, judges, device, bar)
        write_record(folder / RECORD_FILE, evaluation)
        if missed := gate.misses(recipe.gate, evaluation):
            write_page(folder / PAGE_FILE, evaluation)
            _set_aside(folder, aside)
            found = "; ".join(map(str, missed))
            raise ArtifactError(f"refused by the recipe's gate: {found}", where=aside, remedy=missed[0].remedy)
    return manifest, evaluation


def _judges(recipe: Recipe, device: torch.device) -> Judges | None:
    """Whom the gate needs, before minutes go into packing; None where both sides need not speak."""
    options = recipe.evaluate
    if not recipe.gate.keys() & {metric.key for metric in SPOKEN}:
        return None
    return Judges(
        recognizer=recognizer(options.recognizer, str(device)) if options.recognizer else None,
        opinion=Opinion() if options.mos else None,
        likeness=Likeness(_encoders(recipe)) if recipe.gate.keys() & {SIMILARITY.key, TIMBRE.key} else None,
    )


def _encoders(recipe: Recipe) -> Path:
    source = recipe.source
    if source.repo is None or source.revision is None:
        return build.source_folder(recipe)
    return fetch(source.repo, source.revision, [(SPEAKER_ENCODER,)])


def _measure(
    recipe: Recipe, artifact: Artifact, texts: list[str], judges: Judges | None, device: torch.device, bar: Bar
) -> Evaluation:
    voices = artifact_voices(artifact, len(texts))
    with _full_precision(recipe, artifact, device, bar) as reference, bar("measuring", unit="items") as progress:
        return evaluate(
            artifact,
            reference,
            texts,
            voices,
            seed=0,
            arithmetic=Arithmetic(device),
            progress=progress,
            aloud=None if judges is None else Aloud(texts, voices, judges),
        )


@contextmanager
def _full_precision(recipe: Recipe, artifact: Artifact, device: torch.device, bar: Bar) -> Iterator[Artifact]:
    named: dict[str, Any] = recipe.source.model_dump(include={"repo", "revision", "path", "bundled"})
    full = recipe_against(artifact.manifest, named)
    with ExitStack() as stack:
        with bar("reading the checkpoint") as progress:
            # Beside the output, where there is room for artifacts: it takes the bytes of one in float32.
            beside = artifact.folder.parent
            reference = stack.enter_context(lossless(full, device, progress, beside=beside))
        yield reference


def _set_aside(folder: Path, aside: Path) -> None:
    with new_folder(aside, force=True) as target:
        for entry in list(folder.iterdir()):
            entry.rename(target / entry.name)
