"""Checking an artifact in full: every file's hash, every voice, and every module against its source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cosyq.artifact.compare import relative_error
from cosyq.artifact.manifest import FILE_NAME
from cosyq.artifact.reader import Artifact, StageFile, check_file, unpacked
from cosyq.checkpoint.reader import open_checkpoint, open_stage
from cosyq.errors import ArtifactError
from cosyq.model.inventory import STAGES
from cosyq.voices.voice import load_voice

TOLERANCE = 1e-4  # relative, between an error as recorded and as measured again on another device


@dataclass(frozen=True)
class ModuleError:
    """Relative RMS error of one module: as recorded when packed, and the largest of its parameters as measured now."""

    name: str
    recorded: float
    measured: float


def verify_artifact(artifact: Artifact) -> None:
    """Hash every file in full and check every voice.

    Raises:
        ArtifactError: for the first that is not as it should be.
    """
    for name, record in artifact.manifest.files.items():
        check_file(artifact.folder / name, record, full=True)
    for path in artifact.voice_files().values():
        load_voice(path, artifact.manifest.model.flow)


def measure_errors(
    artifact: Artifact, source: Path, progress: Callable[[str, int, int], None]
) -> Iterator[ModuleError]:
    """Compare every module's stored weight with the checkpoint's.

    Raises:
        CheckpointError: the checkpoint is not usable.
        ArtifactError: it is another model, or an error is not the recorded one.
    """
    manifest = artifact.manifest
    checkpoint = open_checkpoint(source, manifest.recipe["source"]["llm"])
    if checkpoint.config != manifest.model:
        raise ArtifactError(f"was made from another model than {source}", where=artifact.folder / FILE_NAME)
    records = {record.name: record for record in manifest.modules}
    done, total = 0, sum(record.bytes for record in manifest.modules)
    for stage in STAGES:
        tensors = open_stage(checkpoint, stage, steps=manifest.flow_steps)
        file = StageFile(artifact, stage)
        for module in artifact.modules(stage):
            record = records[module.name]
            progress(module.name, done, total)
            done += record.bytes
            stored = unpacked(artifact, file, module)
            measured = max(relative_error(stored[name], tensors.read(module, name)) for name in module.parameters)
            if not abs(measured - record.rms_error) <= TOLERANCE + 0.01 * record.rms_error:  # nor is NaN
                raise ArtifactError(
                    f"{module.name} differs from the source by {measured:.4%}, recorded are {record.rms_error:.4%}",
                    where=file.path,
                    remedy="it was made from another checkpoint, or changed since",
                )
            yield ModuleError(module.name, record.rms_error, measured)
