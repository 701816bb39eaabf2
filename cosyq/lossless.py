"""The reference that quantization is measured against: a checkpoint as an artifact in float32, for as long as needed.

Everything compares artifacts then: one way to read weights, one way to speak.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cosyq import build
from cosyq.artifact.manifest import VOICE_FOLDER, Manifest
from cosyq.artifact.reader import Artifact, open_artifact
from cosyq.build import Progress
from cosyq.recipe import Recipe, Source, Stages
from cosyq.voices.enrol import ENCODER_FILES
from cosyq.voices.voice import Voice

FP32 = "fp32"


def lossless_recipe(recipe: Recipe) -> Recipe:
    """The same checkpoint and Euler steps, nothing quantized, no voices."""
    return _recipe(recipe.source, recipe.stages.flow.steps)


def recipe_against(manifest: Manifest, source: dict[str, Any] | None = None) -> Recipe:
    """The recipe of an artifact's full-precision self, whose files must be the ones that the artifact was made from.

    Args:
        source: where they are, `path`, or `repo` and `revision`; None is where they came from.

    Raises:
        ValueError: the manifest, or `source`, names no place.
    """
    recorded = manifest.recipe["source"]
    place = source or {key: recorded.get(key) for key in ("repo", "revision", "bundled")}
    pins = {name: sha256 for name, sha256 in manifest.source.files.items() if name not in ENCODER_FILES}
    origin = Source.model_validate({**place, "llm": recorded["llm"], "sha256": pins})
    return _recipe(origin, list(manifest.flow_steps))


def _recipe(source: Source, steps: list[int]) -> Recipe:
    """Its name is the checkpoint's: what is made for one artifact is the same for any other of it."""
    name = source.bundled or (source.repo or "").rpartition("/")[2]
    weights = {"weights": FP32}
    stages = Stages.model_validate({"llm": weights, "flow": {**weights, "steps": steps}, "vocoder": weights})
    return Recipe(version=1, name=f"{name[:90]}-{FP32}" if name else FP32, source=source, stages=stages)


@contextmanager
def lossless(
    recipe: Recipe,
    device: torch.device,
    progress: Progress,
    *,
    beside: Path | None = None,
    voices: Iterable[tuple[str, Voice]] = (),
) -> Iterator[Artifact]:
    """Pack `recipe`, one of the above, into a temporary folder, in `beside` or where the system keeps such.

    Voices by name, which were made already, are put beside those of the recipe.

    Raises:
        CheckpointError, NetworkError: the checkpoint is not usable, not the one expected, or not to be had.
        ArtifactError: there is no room.
    """
    with tempfile.TemporaryDirectory(prefix=".cosyq-fp32-", dir=beside) as folder:
        target = Path(folder) / "artifact"
        build.run(build.prepare(recipe, ""), target, device, force=False, progress=progress)
        for name, voice in voices:
            (target / VOICE_FOLDER / f"{name}.safetensors").write_bytes(voice.to_bytes())
        yield open_artifact(target)
