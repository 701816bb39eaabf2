"""A choice of formats as a recipe: what most modules of a stage have is its format, and rules say the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cosyq.model.inventory import Module
from cosyq.quantize.formats import FOUR_BIT, Format, FormatName
from cosyq.quantize.plan import make_plan
from cosyq.recipe import Recipe, to_yaml
from cosyq.tune.units import TUNED, with_default

OPTIONS = ("blocksize", "double_quant")  # of a stage's 4-bit formats
LAYER = re.compile(r"(.*?\.)(\d+)(\..*)")


@dataclass(frozen=True)
class TunedRule:
    """A rule to add to a recipe, and the modules that it is there for."""

    rule: dict[str, Any]
    modules: tuple[str, ...]


def tuned_rules(
    recipe: Recipe, modules: Sequence[Module], wanted: Mapping[str, Format]
) -> tuple[dict[str, FormatName], list[TunedRule]]:
    """The stages' formats, and rules after the recipe's own, by which each module has the format wanted.

    Args:
        modules: all that the recipe decides over; `wanted` has those that it may decide.
    """
    defaults: dict[str, FormatName] = {}
    rules: list[TunedRule] = []
    for stage in TUNED:
        found = []
        for name in sorted({wanted[m.name].name for m in modules if m.stage == stage and m.kind == "matrix"}):
            if _allowed(recipe, stage, name):
                plan = make_plan(with_default(recipe, stage, name), list(modules))
                others = [d.module.name for d in plan if d.module.stage == stage and _is_other(d, wanted)]
                found.append((name, _rules(recipe, stage, others, wanted)))
        defaults[stage], added = min(found, key=lambda item: len(item[1]))
        rules += added
    return defaults, rules


def _is_other(decision: Any, wanted: Mapping[str, Format]) -> bool:
    return decision.module.kind != "exact" and decision.format != wanted[decision.module.name]


def _stage(recipe: Recipe, stage: str, name: FormatName) -> dict[str, Any]:
    """The stage as a recipe has it, in another format."""
    options = getattr(recipe.stages, stage).model_dump(exclude_unset=True, exclude_none=True)
    kept = {key: value for key, value in options.items() if name in FOUR_BIT or key not in OPTIONS}
    return {**kept, "weights": name}


def _allowed(recipe: Recipe, stage: str, name: FormatName) -> bool:
    """Whether the stage's other options go with a format."""
    try:
        type(getattr(recipe.stages, stage)).model_validate(_stage(recipe, stage, name))
    except ValueError:
        return False
    return True


def _rules(recipe: Recipe, stage: str, names: Sequence[str], wanted: Mapping[str, Format]) -> list[TunedRule]:
    """One for all modules that differ in the layer alone, or also in the last part of the name, for the same layers."""
    alike: dict[tuple[str, str, FormatName], dict[str, list[str]]] = {}  # ... -> last part -> layers
    for name in names:
        parent, _, leaf = name.rpartition(".")
        found = LAYER.fullmatch(f"{parent}.")
        head, layer, tail = found.groups() if found else (f"{parent}.", "", "")
        alike.setdefault((head, tail, wanted[name].name), {}).setdefault(leaf, []).append(layer)
    rules = []
    for (head, tail, fmt), leaves in alike.items():
        same: dict[tuple[str, ...], list[str]] = {}
        for leaf, layers in leaves.items():
            same.setdefault(tuple(layers), []).append(leaf)
        options = getattr(recipe.stages, stage).model_dump(exclude_none=True)
        extra = {key: options[key] for key in OPTIONS if key in options and fmt in FOUR_BIT}
        for places, last in same.items():
            match = _match([(head,), places, (tail,), tuple(last)])
            covered = tuple(f"{head}{place}{tail}{leaf}" for place in places for leaf in last)
            rules.append(TunedRule({"match": match, "weights": fmt, **extra}, covered))
    return rules


def _match(parts: list[tuple[str, ...]]) -> str:
    """What matches each of the parts' combinations, and nothing else."""
    if all(len(part) == 1 for part in parts):
        return "".join(part[0] for part in parts)
    return "re:" + "".join(
        re.escape(part[0]) if len(part) == 1 else f"({'|'.join(map(re.escape, part))})" for part in parts
    )


def recipe_text(
    recipe: Recipe,
    name: str,
    about: Sequence[str],
    defaults: Mapping[str, FormatName],
    rules: Sequence[TunedRule],
    remarks: Sequence[str],
) -> str:
    """YAML of the recipe with these formats, under another name, and with a remark beside each rule that is new."""
    data = recipe.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    own = data.pop("rules", [])
    stages = data["stages"] | {stage: _stage(recipe, stage, weights) for stage, weights in defaults.items()}
    whole = {"version": data.pop("version"), "name": name, "source": data.pop("source"), "stages": stages}
    added = {"rules": own + [rule.rule for rule in rules]} if own or rules else {}
    lines = to_yaml(whole | added | (data | whole | {"output": f"artifacts/{name}"})).splitlines()
    for index, remark in enumerate(remarks, lines.index("rules:") + 1 + len(own) if rules else 0):
        lines[index] += f"  # {remark}"
    return "\n".join([*(f"# {line}" for line in about), *lines]) + "\n"
