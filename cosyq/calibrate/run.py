"""Calibrated tensors for a build: full precision speaks, its layers are listened to, and packing makes use of it.

Memory beside the networks: a stage's second moments, for the full size 2.8 GB (language model) and 0.8 GB (flow); where
the language model is refined, also a second one and five times its matrices in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from cosyq.artifact.reader import Artifact, load_stage, text_rows
from cosyq.build import Build
from cosyq.calibrate.flow import flow_moments
from cosyq.calibrate.llm import llm_moments
from cosyq.calibrate.moments import Moments
from cosyq.calibrate.refine import refine
from cosyq.calibrate.sentences import Language, sentences
from cosyq.errors import CheckpointError, DeviceError
from cosyq.lossless import lossless, lossless_recipe
from cosyq.model.inventory import Stage
from cosyq.quantize.calibrated import Adjusted, Calibrated, judged, pack_calibrated
from cosyq.quantize.learned import LearnedCodes
from cosyq.quantize.plan import Decision
from cosyq.recipe import Calibration, Refinement
from cosyq.runtime.synthesizer import load
from cosyq.sequences import Heard, Progress, artifact_voices, shown, speak

STAGES: tuple[Stage, ...] = ("llm", "flow")  # that can be calibrated
SEED = 1 << 40  # of the first sequence; evaluations begin at 0


def calibrate(build: Build, device: torch.device, progress: Progress) -> Adjusted:
    """The packed weights of the stages that the recipe wants calibrated, and what was learned beside them.

    Linear layers that the plan packs are calibrated; embeddings, and a stage's small entry and exit layers, are not.

    Raises:
        CheckpointError: a layer's inputs are not usable, or calibration or refinement improved nothing.
        DeviceError: the device has not enough memory.
        others: as `lossless.lossless`.
    """
    wanted = {stage: options for stage in STAGES if (options := getattr(build.recipe.stages, stage).calibrate)}
    found = Adjusted()
    if not wanted:
        return found
    progress("voices", 0, build.bytes)
    voices = build.voices
    try:
        with lossless(lossless_recipe(build.recipe), device, progress, voices=voices) as artifact:
            heard = _speak(artifact, max(options.sequences for options in wanted.values()), device, progress)
            for stage, options in wanted.items():
                packable = [d for d in build.plan[stage] if d.module.kind == "matrix" and not d.format.is_float]
                made = _stage(stage, options, artifact, heard[: options.sequences], packable, device, progress)
                found = Adjusted(found.packed | made.packed, found.floats | made.floats)
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
    options: Calibration,
    artifact: Artifact,
    heard: Sequence[Heard],
    packable: list[Decision],
    device: torch.device,
    progress: Progress,
) -> Adjusted:
    network = _network(artifact, stage, device)
    paths = [decision.module.path for decision in packable]
    if stage == "llm":
        moments = llm_moments(network, text_rows(artifact), heard, paths, progress)
    else:
        moments = flow_moments(network, heard, paths, progress)
    packed: dict[str, Calibrated] = {}
    for index, decision in enumerate(packable):
        name, path = decision.module.name, decision.module.path
        progress(f"calibrating {name}", index, len(packable))
        with _about(name):
            weight = network.get_submodule(path).weight
            packed[name] = pack_calibrated(weight, moments.of(path), decision.format, device)
    if not any(result.weighted < result.plain for result in packed.values()):
        remedy = "leave it out of the recipe"
        raise CheckpointError("calibration improved no module", where=f"stages.{stage}.calibrate", remedy=remedy)
    if isinstance(options, Refinement) and options.refine is not None:
        return _refined(network, options.refine, artifact, heard, packable, moments, packed, device, progress)
    return Adjusted(packed)


def _refined(
    network: Any,
    passes: int,
    artifact: Artifact,
    heard: Sequence[Heard],
    packable: list[Decision],
    moments: Moments,
    packed: dict[str, Calibrated],
    device: torch.device,
    progress: Progress,
) -> Adjusted:
    """The language model's, after what `packed` is by now."""
    codes = {}
    for decision in packable:
        path, tensors = decision.module.path, packed[decision.module.name].tensors
        placed = {name: tensor.to(device) for name, tensor in tensors.items()}
        codes[path] = LearnedCodes(network.get_submodule(path).weight, moments.of(path), decision.format, placed)
    student = _network(artifact, "llm", device)
    try:
        vectors = refine(network, student, text_rows(artifact), heard, codes, passes, progress)
    except ValueError as error:
        remedy = "leave it out of the recipe, or give it more sequences"
        raise CheckpointError(
            f"refinement improved nothing ({error})", where="stages.llm.calibrate.refine", remedy=remedy
        ) from None
    better = {}
    for decision in packable:
        name, path = decision.module.name, decision.module.path
        weight, moment, tensors = network.get_submodule(path).weight, moments.of(path), codes[path].tensors()
        with _about(name):
            better[name] = judged(tensors, weight, moment, decision.format, device, plain=packed[name].plain)
    floats = {}
    for name, value in vectors.items():
        path, _, parameter = name.rpartition(".")
        floats[f"llm.{path}", parameter] = value
    return Adjusted(better, floats)


def _network(artifact: Artifact, stage: Stage, device: torch.device) -> Any:
    return load_stage(artifact, stage, device=device, dtype=torch.float32, matmul="dequantize")


@contextmanager
def _about(name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"cannot be calibrated ({error})", where=name) from None
