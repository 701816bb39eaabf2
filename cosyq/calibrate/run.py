"""Calibrated tensors for a build: full precision speaks, its layers are listened to, and packing makes use of it.

Memory beside the networks: a stage's second moments, for the full size 2.8 GB (language model) and 0.8 GB (flow).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cosyq.artifact.reader import Artifact, load_stage, text_rows
from cosyq.build import Build
from cosyq.calibrate.flow import flow_moments
from cosyq.calibrate.llm import llm_moments
from cosyq.calibrate.sentences import Language, sentences
from cosyq.errors import CheckpointError, DeviceError
from cosyq.lossless import lossless, lossless_recipe
from cosyq.model.inventory import Stage
from cosyq.quantize.calibrated import Calibrated, pack_calibrated
from cosyq.quantize.plan import Decision
from cosyq.runtime.synthesizer import load
from cosyq.sequences import Heard, Progress, artifact_voices, shown, speak

SEED = 1 << 40  # of the first sequence; evaluations begin at 0


def calibrate(build: Build, device: torch.device, progress: Progress) -> dict[str, Calibrated]:
    """The packed weights of the stages that the recipe wants calibrated, by module name; none without such a stage.

    Linear layers that the plan packs are calibrated; embeddings, and a stage's small entry and exit layers, are not.

    Raises:
        CheckpointError: a layer's inputs are not usable, or calibration improved nothing.
        DeviceError: the device has not enough memory.
        others: as `lossless.lossless`.
    """
    counts: dict[Stage, int] = {}
    for stage in ("llm", "flow"):
        if options := getattr(build.recipe.stages, stage).calibrate:
            counts[stage] = options.sequences
    if not counts:
        return {}
    recipe = lossless_recipe(build.recipe).model_copy(update={"voices": build.recipe.voices})
    found: dict[str, Calibrated] = {}
    try:
        with lossless(recipe, device, progress) as artifact:
            heard = _speak(artifact, max(counts.values()), device, progress)
            for stage, count in counts.items():
                wanted = [d for d in build.plan[stage] if d.module.kind == "matrix" and not d.format.is_float]
                found |= _stage(stage, artifact, heard[:count], wanted, device, progress)
    except torch.OutOfMemoryError:
        remedy = "free some, or use --device cpu"
        raise DeviceError("out of memory while calibrating", where=str(device), remedy=remedy) from None
    return found


def _speak(artifact: Artifact, count: int, device: torch.device, progress: Progress) -> list[Heard]:
    languages: tuple[Language, ...] = ("en",) if artifact.manifest.bundled else ("en", "zh")
    voices = artifact_voices(artifact)
    speaker = load(artifact, device=str(device))
    said = speak(speaker, sentences(languages, count), voices, seed=SEED, progress=progress)
    return shown(speaker.requests, said, voices)[:count]


def _stage(
    stage: Stage,
    artifact: Artifact,
    heard: Sequence[Heard],
    wanted: list[Decision],
    device: torch.device,
    progress: Progress,
) -> dict[str, Calibrated]:
    network: Any = load_stage(artifact, stage, device=device, dtype=torch.float32, matmul="dequantize")
    paths = [decision.module.path for decision in wanted]
    if stage == "llm":
        moments = llm_moments(network, text_rows(artifact), heard, paths, progress)
    else:
        moments = flow_moments(network, heard, paths, progress)
    found: dict[str, Calibrated] = {}
    for index, decision in enumerate(wanted):
        name, path = decision.module.name, decision.module.path
        progress(f"calibrating {name}", index, len(wanted))
        try:
            weight = network.get_submodule(path).weight
            found[name] = pack_calibrated(weight, moments.of(path), decision.format, device)
        except (ValueError, OverflowError) as error:
            raise CheckpointError(f"cannot be calibrated ({error})", where=name) from None
    if not any(result.weighted < result.plain for result in found.values()):
        remedy = "leave it out of the recipe"
        raise CheckpointError("calibration improved no module", where=f"stages.{stage}.calibrate", remedy=remedy)
    return found
