"""Two artifacts side by side: which modules they hold differently, and how far apart the weights are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cosyq.artifact.manifest import STAGE_FILES, Manifest
from cosyq.artifact.reader import DAMAGED, Artifact, StageFile, unpacked
from cosyq.errors import ArtifactError
from cosyq.model.inventory import STAGES, Module

AT_ONCE = 1 << 22  # numbers that are compared in float64 at a time: a text embedding has 136 M


@dataclass(frozen=True)
class Held:
    """How an artifact holds a module."""

    format: str
    bytes: int


@dataclass(frozen=True)
class Difference:
    """A module that two artifacts hold differently, None where one has it not.

    `error` is |second - first| / |first| of the dequantized parameter that differs most, None where there is no such
    number: for a module that one has not, another shape, or a value that is not finite.
    """

    module: str
    first: Held | None
    second: Held | None
    error: float | None


def differences(first: Artifact, second: Artifact, progress: Callable[[str, int, int], None]) -> Iterator[Difference]:
    """The modules whose tensors are not the same to the bit, in the order of the networks.

    Raises:
        ArtifactError: a packed tensor contradicts itself.
    """
    done, total = 0, sum(record.bytes for record in first.manifest.modules)
    held = [{r.name: Held(str(r.format), r.bytes) for r in side.manifest.modules} for side in (first, second)]
    for stage in STAGES:
        files = [StageFile(side, stage) for side in (first, second)]
        modules = [{module.name: module for module in side.modules(stage)} for side in (first, second)]
        for name in modules[0] | modules[1]:
            progress(name, done, total)
            one, other = (side.get(name) for side in held)
            done += one.bytes if one else 0
            if name not in modules[0] or name not in modules[1]:
                yield Difference(name, one, other, None)
            elif not _same(*(file.read(side[name]) for file, side in zip(files, modules, strict=True))):
                error = _error(*(_weights(file, side[name]) for file, side in zip(files, modules, strict=True)))
                yield Difference(name, one, other, error)


def beside(first: Manifest, second: Manifest) -> dict[str, tuple[str, str]]:
    """What differs beside the weights, as text: where they came from, and the other files."""
    mine, other = _about(first), _about(second)
    return {
        key: (mine.get(key, "none"), other.get(key, "none"))
        for key in sorted(mine | other)
        if mine.get(key) != other.get(key)
    }


def relative_error(found: Tensor, source: Tensor) -> float:
    """|found - source| / |source| over all elements, summed in float64; what is nothing differs by infinity."""
    error = size = 0.0
    for a, b in zip(found.reshape(-1).split(AT_ONCE), source.reshape(-1).split(AT_ONCE), strict=True):
        a, b = a.double(), b.double()
        error += (a - b).square().sum().item()
        size += b.square().sum().item()
    return 0.0 if error == 0 else math.sqrt(error / size) if size else math.inf


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        a.dtype == second[name].dtype and torch.equal(a, second[name]) for name, a in first.items()
    )


def _weights(file: StageFile, module: Module) -> dict[str, Tensor]:
    try:
        return unpacked(file.artifact, file, module)
    except ValueError as error:
        raise ArtifactError(f"{module.name}: {error}", where=file.path, remedy=DAMAGED) from None


def _error(first: dict[str, Tensor], second: dict[str, Tensor]) -> float | None:
    if {name: t.shape for name, t in first.items()} != {name: t.shape for name, t in second.items()}:
        return None
    worst = max(relative_error(second[name], t) for name, t in first.items())
    return worst if math.isfinite(worst) else None


def _about(manifest: Manifest) -> dict[str, str]:
    source = f"{manifest.source.repo}@{manifest.source.revision}" if manifest.source.repo else "no repository"
    about = {"name": manifest.name, "source": source, "recipe": manifest.recipe_sha256, "device": manifest.device}
    about |= {f"source of {name}": sha256 for name, sha256 in manifest.source.files.items()}
    about |= {f"version of {name}": version for name, version in manifest.versions.items()}
    return about | {n: record.sha256 for n, record in manifest.files.items() if n not in STAGE_FILES.values()}
