"""What every choice costs: full precision speaks, and is asked one unit and one format at a time.

What was measured is kept, so that an interrupted run goes on, and one with another budget measures nothing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch

import cosyq
from cosyq.build import Build
from cosyq.checkpoint.reader import file_sha256
from cosyq.errors import DeviceError
from cosyq.eval.run import listen, prepare_folder
from cosyq.eval.stages import Arithmetic
from cosyq.files import cache_folder
from cosyq.lossless import lossless, lossless_recipe
from cosyq.recipe import Recipe
from cosyq.sequences import artifact_voices
from cosyq.tune.kept import Costs
from cosyq.tune.probe import open_probe
from cosyq.tune.sentences import sentences
from cosyq.tune.units import TUNED, Choice, Unit

SEED = 1 << 41  # of the first sequence; evaluations begin at 0
FLOW_SHARE = 4  # the flow is shown one in so many sequences, two at least: one takes it ten times as long
FLOW_STEPS = 5  # Euler steps at most: modules rank as with the artifact's own

Bar = Callable[..., AbstractContextManager[Callable[..., None]]]  # a progress bar with a title


def measure(
    prepared: Build,
    units: Sequence[Unit],
    *,
    sequences: int,
    device: torch.device,
    file: Path | None,
    bar: Bar,
) -> Costs:
    """The costs of all that the units may be.

    Args:
        sequences: utterances that the language model is shown.
        file: what is measured is kept there; None is a file in the user's cache.

    Raises:
        ArtifactError: what is measured cannot be kept, or the file is another's.
        DeviceError: the device ran out of memory or of finite numbers.
        others: as `lossless` and `eval.run.listen`.
    """
    reference = _reference(prepared)
    texts = sentences(sequences, bundled=reference.source.bundled is not None)
    origin = _origin(reference, prepared, texts, device)
    place = file or cache_folder("tune") / f"{origin}.json"
    prepare_folder(place.parent, "name a file with --measured, or set XDG_CACHE_HOME")
    costs = Costs(place, origin)
    missing = [(u, c) for u in units for c in u.choices if (u.name, c.format) not in costs]
    if missing:
        try:
            _measure(costs, missing, reference, texts, device, bar)
        except torch.OutOfMemoryError:
            remedy = "free some, take fewer --sequences, or use --device cpu"
            raise DeviceError("out of memory while measuring", where=str(device), remedy=remedy) from None
    return costs


def _reference(prepared: Build) -> Recipe:
    """The checkpoint in float32, with the recipe's voices, and few Euler steps."""
    recipe = lossless_recipe(prepared.recipe)
    flow = recipe.stages.flow.model_copy(update={"steps": [min(prepared.steps[0], FLOW_STEPS)]})
    stages = recipe.stages.model_copy(update={"flow": flow})
    return recipe.model_copy(update={"stages": stages, "voices": prepared.recipe.voices})


def _measure(
    costs: Costs,
    missing: Sequence[tuple[Unit, Choice]],
    reference: Recipe,
    texts: Sequence[str],
    device: torch.device,
    bar: Bar,
) -> None:
    arithmetic, done = Arithmetic(device), 0
    with bar("reading the checkpoint") as progress, lossless(reference, device, progress) as artifact:
        voices = artifact_voices(artifact, len(texts))
        with bar("measuring", unit="items") as progress:
            heard = listen(artifact, artifact, texts, voices, seed=SEED, arithmetic=arithmetic, progress=progress)
            shown = {"llm": heard, "flow": heard[: max(len(heard) // FLOW_SHARE, 2)]}
            for stage in TUNED:
                mine = [(unit, choice) for unit, choice in missing if unit.stage == stage]
                if not mine:
                    continue
                probe = open_probe(stage, artifact, shown[stage], arithmetic)
                for unit, choice in mine:
                    progress(f"{unit.name} {choice.format}", done, len(missing))
                    costs.put(unit.name, choice.format, probe.cost({m.name: choice.format for m in unit.modules}))
                    done += 1


def _origin(reference: Recipe, prepared: Build, texts: Sequence[str], device: torch.device) -> str:
    """sha256 of all that decides the costs, but for the order of sums."""
    made_of = {
        "recipe": reference.digest(),
        "files": {name: file_sha256(path) for name, path in sorted(prepared.checkpoint.files.items())},
        "texts": list(texts),
        "seed": SEED,
        "shown": [FLOW_SHARE, FLOW_STEPS],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": [cosyq.__version__, torch.__version__, importlib.metadata.version("bitsandbytes")],
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
