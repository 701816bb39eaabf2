"""cosyq tune: a recipe that loses the least within a budget."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosyq.cli.console import Device, Json, emit, megabytes, note, progress_bar
from cosyq.cli.quantize import source_override
from cosyq.errors import UsageError

if TYPE_CHECKING:
    from cosyq.model.inventory import Stage
    from cosyq.quantize.formats import FormatName


def tune(
    recipe: Annotated[str, typer.Argument(help="A recipe's path, or the name of a shipped one.")],
    budget: Annotated[
        str, typer.Option(metavar="600MB|4.5bpw", help="What the artifact's weights may take, or a matrix' weight.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Else NAME-tuned-BUDGET.yaml, here.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="A checkpoint's folder, or REPO@REVISION on the Hub.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key.")] = None,
    formats: Annotated[str, typer.Option(help="What to choose from: int8, nf4, fp4, bf16.")] = "int8,nf4,bf16",
    sequences: Annotated[
        int,
        typer.Option(min=2, max=32, help="Utterances that the language model is measured on; the flow on a quarter."),
    ] = 8,
    weight: Annotated[str, typer.Option(help="How much each stage's loss counts.")] = "llm=1,flow=1",
    measured: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to keep what is measured; else in the user's cache.")
    ] = None,
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing recipe.")] = False,
    as_json: Json = False,
) -> None:
    """Measure what each format costs each module, choose within a budget, and write that as a recipe.

    What the recipe's own rules decide stays. Beside the recipe, a JSON file has all that was measured. Run it again to
    go on after an interruption, or with another budget, for which nothing is measured anew.
    """
    from cosyq.recipe import find_recipe, load_recipe
    from cosyq.tune.budget import parse_budget

    size, names, shares = parse_budget(budget), _formats(formats), _shares(weight)
    loaded = load_recipe(find_recipe(recipe), [*(overrides or []), *(source_override(source) if source else [])])

    from cosyq.files import whole_file
    from cosyq.runtime.engine import pick_device
    from cosyq.tune.run import Settings, tuned_name
    from cosyq.tune.run import tune as choose

    target = output or Path(f"{tuned_name(loaded, size)}.yaml")
    beside = target.with_suffix(".json")
    _check(target, beside, force=force)
    tuned = choose(
        loaded,
        size,
        Settings(names, sequences, shares),
        device=pick_device(device),
        measured=measured,
        bar=progress_bar,
    )
    with whole_file(beside) as partial:
        partial.write_text(json.dumps(tuned.report, indent=1) + "\n", "utf-8")
    with whole_file(target) as partial:
        partial.write_text(tuned.recipe, "utf-8")
    report = tuned.report
    if as_json:
        emit({"output": str(target), "sensitivities": str(beside), **report})
        return
    if tuned.ample:
        note(f"{budget} is more than it takes: everything has its best format")
    note(f"{megabytes(report['bytes'])}, {report['bits_per_weight']:.3f} bits a matrix' weight")
    for stage, found in report["predicted"].items():
        note(f"{stage}: {found['loss']:.4g} {found['unit']} predicted, {found['smallest']:.4g} at its smallest")
    print(target)


def _formats(text: str) -> tuple[FormatName, ...]:
    from cosyq.tune.units import FORMATS

    names = dict.fromkeys(part.strip() for part in text.split(","))
    if not names or not set(names) <= set(FORMATS):
        raise UsageError("names no formats", where=f"--formats {text:.80}", remedy=f"choose of {', '.join(FORMATS)}")
    return tuple(name for name in FORMATS if name in names)


def _shares(text: str) -> dict[Stage, float]:
    """llm=1,flow=1 -> how much each counts."""
    shares: dict[Stage, float] = {"llm": 1.0, "flow": 1.0}
    for part in text.split(","):
        stage, _, number = part.strip().partition("=")
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        if stage not in shares or not 0 <= share <= 1e6 or math.isnan(share):
            raise UsageError("not a stage's weight", where=f"--weight {text:.80}", remedy="give such as llm=1,flow=2")
        shares[stage] = share
    if not any(shares.values()):
        raise UsageError("nothing counts", where=f"--weight {text:.80}")
    return shares


def _check(target: Path, beside: Path, *, force: bool) -> None:
    """Before minutes go into what could then not be written."""
    if target.suffix not in (".yaml", ".yml") or target.is_dir() or not target.parent.is_dir():
        raise UsageError("no recipe can be written there", where=target, remedy="name a file such as tuned.yaml")
    for path in (target, beside):
        if path.exists() and not force:
            raise UsageError("is there already", where=path, remedy="give --force or another name with -o")
