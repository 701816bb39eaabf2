"""The compiler: recipe + checkpoint -> plan -> voices -> pack -> artifact, one tensor at a time."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

import cosyq
from cosyq.artifact import manifest as layout
from cosyq.artifact.manifest import FileRecord, Manifest, ModuleRecord, SourceRecord
from cosyq.artifact.reader import stage_metadata, stage_tensors
from cosyq.artifact.stagefile import StageFileWriter
from cosyq.artifact.writer import check_output, check_room, new_folder
from cosyq.checkpoint.reader import (
    TEXT_FILES,
    Checkpoint,
    StageTensors,
    file_sha256,
    open_checkpoint,
    open_stage,
    weight_files,
)
from cosyq.errors import CheckpointError, DeviceError
from cosyq.model.inventory import STAGES, Stage, inventory
from cosyq.quantize.calibrated import Adjusted
from cosyq.quantize.formats import Format
from cosyq.quantize.pack import pack, relative_error
from cosyq.quantize.plan import Decision, make_plan
from cosyq.recipe import Recipe, bundled_checkpoint
from cosyq.voices.enrol import ENCODER_FILES, encoder_files
from cosyq.voices.entries import make, pin
from cosyq.voices.voice import Voice

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all
NOT_CALIBRATED = Adjusted()


@dataclass(frozen=True)
class Build:
    """Everything that is known before a weight is read."""

    recipe: Recipe
    recipe_text: str
    checkpoint: Checkpoint
    plan: dict[Stage, list[Decision]]
    encoders: Path | None  # the folder of what makes voices of recordings, where the recipe asks for it

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(self.recipe.stages.flow.steps)

    @property
    def bytes(self) -> int:
        return sum(decision.bytes for decisions in self.plan.values() for decision in decisions)

    @cached_property
    def voices(self) -> list[tuple[str, Voice]]:
        """By name, enrolled when they are first asked for; errors as of `voices.entries.make`."""
        return make(self.recipe, self.encoders, self.checkpoint.config.flow)


def source_folder(recipe: Recipe) -> Path:
    """The checkpoint's folder, fetched from the Hub when the recipe names a repository.

    The encoders, a gigabyte, come along only where the recipe has a voice to enrol.
    """
    source = recipe.source
    if source.path is not None:
        return Path(source.path)
    if source.bundled is not None:
        return bundled_checkpoint(source.bundled)
    from cosyq.hub.snapshot import fetch

    assert source.repo is not None
    assert source.revision is not None
    weights = [(str(Path(name).with_suffix(".safetensors")), name) for name in weight_files(source.llm).values()]
    others = [*TEXT_FILES, *(ENCODER_FILES if recipe.enrols else ())]
    return fetch(source.repo, source.revision, [*weights, *((name,) for name in others)])


def prepare(recipe: Recipe, recipe_text: str) -> Build:
    """Hear the voices' recordings, fetch and open the checkpoint, and decide for every module: small things first.

    Raises:
        CheckpointError, RecipeError: it is not usable, or the recipe does not fit it.
        NetworkError: what the recipe names cannot be fetched.
    """
    recipe = pin(recipe)
    folder = source_folder(recipe)
    checkpoint = open_checkpoint(folder, recipe.source.llm)
    steps = tuple(recipe.stages.flow.steps)
    modules = {stage: inventory(stage, checkpoint.config, steps=steps) for stage in STAGES}
    for stage in STAGES:
        open_stage(checkpoint, stage, steps=steps)  # every name and shape is checked before the work begins
    if recipe.enrols:
        encoder_files(folder)
    decisions = make_plan(recipe, [module for stage in STAGES for module in modules[stage]])
    plan: dict[Stage, list[Decision]] = {stage: [] for stage in STAGES}
    for decision in decisions:
        plan[decision.module.stage].append(decision)  # type: ignore[index]
    return Build(recipe, recipe_text, checkpoint, plan, folder if recipe.enrols else None)


def run(
    build: Build,
    output: Path,
    device: torch.device,
    *,
    force: bool,
    progress: Progress,
    calibrated: Adjusted = NOT_CALIBRATED,
) -> Manifest:
    """Pack everything on `device` and write the artifact.

    Args:
        calibrated: weights that are packed already, and other values for float parameters; see `calibrate.run`.

    Raises:
        CheckpointError: a weight is not finite, an encoder is not usable, or a file is not the pinned one.
        ArtifactError: the artifact cannot be written, or a ready voice does not fit it.
        DeviceError: the device has not enough memory.
    """
    check_output(output, force=force)
    check_room(output, build.bytes)
    progress("voices", 0, build.bytes)
    voices = build.voices
    files = build.checkpoint.files | (encoder_files(build.encoders) if build.encoders else {})
    # Hashing 3.4 GB takes as long as packing it, and both leave the interpreter's lock alone.
    with ThreadPoolExecutor(1) as pool, new_folder(output, force=force) as folder:
        hashes = {name: pool.submit(file_sha256, path) for name, path in files.items()}
        try:
            manifest = _write(build, folder, device, voices, hashes, calibrated, progress)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return manifest


def _write(
    build: Build,
    folder: Path,
    device: torch.device,
    voices: list[tuple[str, Voice]],
    hashes: dict[str, Future[str]],
    calibrated: Adjusted,
    progress: Progress,
) -> Manifest:
    records: list[ModuleRecord] = []
    files: dict[str, FileRecord] = {}
    done = 0
    for stage in STAGES:
        name = layout.STAGE_FILES[stage]
        source = open_stage(build.checkpoint, stage, steps=build.steps)
        metadata = stage_metadata(stage, layout.SCHEMA, build.recipe.digest(), build.recipe.source.revision)
        formats = {decision.module.name: decision.format for decision in build.plan[stage]}
        tensors = stage_tensors([decision.module for decision in build.plan[stage]], formats)
        with StageFileWriter(folder / name, tensors, metadata) as file:
            for decision in build.plan[stage]:
                progress(decision.module.name, done, build.bytes)
                records.append(_pack_module(decision, source, file, device, calibrated))
                done += decision.bytes
        files[name] = _record(folder / name, file.header_sha256)
    progress("hashing the source", done, build.bytes)
    sources = {name: future.result() for name, future in hashes.items()}
    _check_pins(build, sources)

    (folder / layout.TOKENIZER_FILE).write_text(build.checkpoint.tokenizer, "utf-8")
    (folder / layout.RECIPE_FILE).write_text(build.recipe_text, "utf-8")
    (folder / layout.VOICE_FOLDER).mkdir()
    for voice_name, voice in voices:
        (folder / layout.VOICE_FOLDER / f"{voice_name}.safetensors").write_bytes(voice.to_bytes())
    small = [layout.TOKENIZER_FILE, layout.RECIPE_FILE]
    for name in [*small, *(f"{layout.VOICE_FOLDER}/{voice_name}.safetensors" for voice_name, _ in voices)]:
        files[name] = _record(folder / name)

    source_of = build.recipe.source
    libraries = ("bitsandbytes", "onnxruntime") if build.encoders else ("bitsandbytes",)
    manifest = Manifest(
        name=build.recipe.name,
        source=SourceRecord(source_of.repo, source_of.revision, dict(sorted(sources.items()))),
        recipe=build.recipe.resolved(),
        recipe_sha256=build.recipe.digest(),
        model=build.checkpoint.config,
        flow_steps=build.steps,
        modules=tuple(records),
        files=files,
        versions={
            "cosyq": cosyq.__version__,
            "torch": torch.__version__,
            **{library: importlib.metadata.version(library) for library in libraries},
        },
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )
    (folder / layout.FILE_NAME).write_text(manifest.to_json(), "utf-8")
    return manifest


def _pack_module(
    decision: Decision, source: StageTensors, file: StageFileWriter, device: torch.device, calibrated: Adjusted
) -> ModuleRecord:
    module, error = decision.module, 0.0
    ready = calibrated.packed.get(module.name)
    prefix = f"{module.path}." if module.path else ""
    for parameter in module.parameters:
        packable = parameter == "weight" and module.kind != "exact"
        if packable and ready is not None:
            _write_tensors(file, prefix, ready.tensors)
            error = max(error, ready.error)
            continue
        weight = source.read(module, parameter)
        learned = calibrated.floats.get((module.name, parameter))
        if learned is not None:
            _write_tensors(file, prefix, {parameter: learned})
            error = max(error, relative_error(learned - weight.float(), weight.float()))
            continue
        try:
            packed, loss = pack(weight, decision.format if packable else Format("fp32"), device)
        except OverflowError as reason:
            broken = source.not_finite(module, parameter)
            if broken:
                raise CheckpointError(f"tensor {', '.join(broken)} holds NaN or infinity", where=source.path) from None
            raise CheckpointError(f"{module.name} as {decision.format}: {reason}", where=source.path) from None
        except torch.OutOfMemoryError:
            raise DeviceError(
                f"out of memory while packing {module.name}", where=str(device), remedy="free some, or use --device cpu"
            ) from None
        _write_tensors(file, prefix, packed if packable else {parameter: packed["weight"]})
        error = max(error, loss if packable else 0.0)
    first = next(iter(module.parameters))
    main = "weight" if "weight" in module.parameters else first
    return ModuleRecord(
        name=module.name,
        format=decision.format,
        rule=decision.rule,
        shape=module.parameters[main],
        source_dtype=source.dtype(module, main),
        bytes=decision.bytes,
        rms_error=_rounded(error),
        weighted_error=None if ready is None else _rounded(ready.weighted),
    )


def _write_tensors(file: StageFileWriter, prefix: str, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        file.write(f"{prefix}{name}", tensor)


def _rounded(error: float) -> float:
    """Six digits: the last ones are the order of a sum, which threads decide."""
    return float(f"{error:.6g}")


def _record(path: Path, header_sha256: str | None = None) -> FileRecord:
    return FileRecord(path.stat().st_size, file_sha256(path), header_sha256)


def _check_pins(build: Build, found: dict[str, str]) -> None:
    unread = () if build.encoders else ENCODER_FILES  # pinned for voices that this build does not make
    for name, expected in build.recipe.source.sha256.items():
        if name not in unread and found.get(name) != expected:
            raise CheckpointError(
                f"sha256 is {found.get(name, 'unknown')}, the recipe pins {expected}",
                where=name,
                remedy="it is not the checkpoint that the recipe was written for",
            )
