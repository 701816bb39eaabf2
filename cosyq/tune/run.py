"""From a recipe and a budget to a tuned recipe.

Costs are measured one unit at a time in an otherwise exact network and added up, as HAWQ-V2 (Dong et al., arXiv
1911.03852) adds up its second-order estimates; here they are the distances themselves, of the very bytes that a build
would write.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cosyq import build
from cosyq.build import Build
from cosyq.errors import UsageError
from cosyq.model.inventory import Module, Stage
from cosyq.quantize.formats import FormatName
from cosyq.quantize.plan import make_plan
from cosyq.recipe import Recipe, parse_recipe
from cosyq.tune.budget import Budget
from cosyq.tune.kept import Costs
from cosyq.tune.knapsack import Option, allocate
from cosyq.tune.measure import Bar, measure
from cosyq.tune.probe import UNITS
from cosyq.tune.units import TUNED, Choice, Choices, Unit, find_choices
from cosyq.tune.written import TunedRule, recipe_text, tuned_rules


@dataclass(frozen=True)
class Settings:
    """What decides a choice, beside the recipe and the budget.

    sequences: utterances that full precision is measured on.
    shares: what a stage's loss counts; it is 1 where all of the stage has its smallest formats.
    """

    formats: tuple[FormatName, ...]
    sequences: int
    shares: Mapping[Stage, float]


@dataclass(frozen=True)
class Pick:
    """A unit, the choice that was made, and what it costs."""

    unit: Unit
    choice: Choice
    cost: float


@dataclass(frozen=True)
class Tuned:
    """A recipe in YAML, and what it follows from, as plain data.

    ample: the budget is more than what is best takes.
    """

    recipe: str
    report: dict[str, Any]
    ample: bool


def tuned_name(recipe: Recipe, budget: Budget) -> str:
    ending = f"-tuned-{budget}"
    return recipe.name[: 100 - len(ending)] + ending


def tune(
    recipe: Recipe, budget: Budget, settings: Settings, *, device: torch.device, measured: Path | None, bar: Bar
) -> Tuned:
    """Choose a format for everything that the recipe's own rules leave open.

    Args:
        measured: the file that costs are kept in; see `measure`.

    Raises:
        UsageError: the budget is less than the smallest formats take.
        others: as `build.prepare`, `find_choices` and `measure`.
    """
    prepared = build.prepare(recipe, "")
    choices = find_choices(recipe, _modules(prepared), settings.formats)
    limit = budget.limit(choices.rest, choices.weights)
    if limit < choices.smallest:
        what = f"{', '.join(settings.formats)} take more"
        raise UsageError(what, where=f"--budget {budget}", remedy=f"the least is {_least(budget, choices)}")
    costs = measure(prepared, choices.units, sequences=settings.sequences, device=device, file=measured, bar=bar)
    picks = pick(choices, costs, settings.shares, limit)
    name = tuned_name(recipe, budget)
    text = _text(recipe, name, budget, prepared, choices, picks)
    size = choices.fixed + sum(pick.choice.bytes for pick in picks)
    weight_bytes = sum(pick.choice.weight_bytes for pick in picks if pick.unit.weights)
    report = {
        "recipe": name,
        "budget": str(budget),
        "limit_bytes": limit,
        "bytes": size,
        "bits_per_weight": 8 * weight_bytes / choices.weights if choices.weights else None,
        "measured": costs.origin,
        "sequences": settings.sequences,
        "weight": dict(settings.shares),
        "predicted": {stage: _predicted(stage, picks, costs) for stage in TUNED},
        "modules": [_row(pick, costs) for pick in picks],
    }
    return Tuned(text, report, ample=limit > choices.largest)


def pick(choices: Choices, costs: Costs, shares: Mapping[Stage, float], limit: int) -> list[Pick]:
    """The least sum of both stages' losses, each in parts of what its smallest formats lose."""
    scales = {stage: shares[stage] / (_smallest_loss(stage, choices.units, costs) or 1) for stage in TUNED}
    options = [
        [Option(choice.bytes, costs[unit.name, choice.format] * scales[unit.stage]) for choice in unit.choices]
        for unit in choices.units
    ]
    chosen = allocate(options, limit - choices.fixed)
    return [
        Pick(unit, choice := unit.choices[index], costs[unit.name, choice.format])
        for unit, index in zip(choices.units, chosen, strict=True)
    ]


def _modules(prepared: Build) -> list[Module]:
    return [decision.module for stage in prepared.plan.values() for decision in stage]


def _smallest_loss(stage: str, units: Sequence[Unit], costs: Costs) -> float:
    return math.fsum(costs[unit.name, unit.choices[0].format] for unit in units if unit.stage == stage)


def _least(budget: Budget, choices: Choices) -> str:
    """The least that such a budget can be, rounded up."""
    if budget.unit == "bpw" and choices.weights:
        return f"{math.ceil(8000 * (choices.smallest - choices.rest) / choices.weights) / 1000:g}bpw"
    return f"{math.ceil(choices.smallest / 1000) / 1000:.3f}MB"


def _predicted(stage: str, picks: Sequence[Pick], costs: Costs) -> dict[str, Any]:
    """The loss of a stage, and what it would be with its smallest formats."""
    mine = [pick for pick in picks if pick.unit.stage == stage]
    return {
        "unit": UNITS[stage],
        "loss": math.fsum(pick.cost for pick in mine),
        "smallest": _smallest_loss(stage, [pick.unit for pick in mine], costs),
    }


def _row(pick: Pick, costs: Costs) -> dict[str, Any]:
    unit = pick.unit
    return {
        "modules": [module.name for module in unit.modules],
        "format": str(pick.choice.format),
        "choices": {str(c.format): {"bytes": c.bytes, "cost": costs[unit.name, c.format]} for c in unit.choices},
    }


def _text(recipe: Recipe, name: str, budget: Budget, prepared: Build, choices: Choices, picks: Sequence[Pick]) -> str:
    """The recipe, after making sure that it says what was picked."""
    modules = _modules(prepared)
    wanted = choices.untouched | {module.name: pick.choice.format for pick in picks for module in pick.unit.modules}
    defaults, rules = tuned_rules(recipe, modules, wanted)
    size = choices.fixed + sum(pick.choice.bytes for pick in picks)
    losses = {stage: math.fsum(pick.cost for pick in picks if pick.unit.stage == stage) for stage in TUNED}
    about = [
        f"By `cosyq tune {recipe.name} --budget {budget}`: {size / 1e6:.3f} MB.",
        "Predicted: " + ", ".join(f"{stage} {losses[stage]:.4g} {UNITS[stage]}" for stage in TUNED) + ".",
        "Beside a rule: of that, what its modules lose.",
    ]
    text = recipe_text(recipe, name, about, defaults, rules, [_remark(rule, picks) for rule in rules])
    plan = make_plan(parse_recipe(text, name, []), modules)
    assert {d.module.name: d.format for d in plan if d.module.kind != "exact"} == wanted
    assert sum(decision.bytes for decision in plan) == size
    return text


def _remark(rule: TunedRule, picks: Sequence[Pick]) -> str:
    lost = math.fsum(pick.cost for pick in picks if pick.unit.modules[0].name in rule.modules)
    return f"{lost:.3g}"
