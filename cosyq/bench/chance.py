"""An artifact of random weights, for as long as it is needed: what it costs to speak does not depend on the values."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from cosyq import build
from cosyq.bench.timing import Say
from cosyq.random_model import FULL, SMALL, write_random
from cosyq.recipe import find_recipe, load_recipe

SIZES = {"full": FULL, "small": SMALL}
SEED = 0


@contextmanager
def random_artifact(
    size: Literal["full", "small"], recipe: str, steps: int | None, device: torch.device, say: Say
) -> Iterator[Path]:
    """The folder of a random checkpoint, packed on `device` as a recipe says; it is gone afterwards, whatever happens.

    Args:
        size: full is the published model's, 3.4 GB before it is packed.
        steps: Euler steps to have a table for; None leaves that to the recipe.

    Raises:
        RecipeError: there is no such recipe, or it fits no such checkpoint.
        CheckpointError, ArtifactError: the disk is full.
        DeviceError: the device has not enough memory.
    """
    path = find_recipe(recipe)
    with tempfile.TemporaryDirectory(prefix="cosyq-bench-") as scratch:
        checkpoint, output = Path(scratch) / "checkpoint", Path(scratch) / "artifact"
        nothing = [f"source.{key}=null" for key in ("repo", "revision", "bundled")]
        changes = [*nothing, "source.sha256={}", f"source.path={checkpoint}", "voices=[]"]
        changes += [f"name=random-{size}-{path.stem}", *([f"stages.flow.steps=[{steps}]"] if steps else [])]
        loaded = load_recipe(path, changes)
        say(f"random weights, {size} size")
        write_random(checkpoint, SIZES[size], SEED)
        prepared = build.prepare(loaded, path.read_text("utf-8"))
        build.run(
            prepared,
            output,
            device,
            force=False,
            progress=lambda _, done, total: say(f"random weights, packing: {done / total:.0%}"),
        )
        shutil.rmtree(checkpoint)
        yield output
