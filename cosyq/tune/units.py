"""What there is to choose: modules, and the formats that each of them may have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from cosyq.errors import RecipeError
from cosyq.model.inventory import Module, Stage
from cosyq.quantize.formats import FOUR_BIT, Format, FormatName, module_tensors, stored_bytes, stored_tensors
from cosyq.quantize.plan import fit, make_plan, matches, named
from cosyq.recipe import Recipe

TUNED: tuple[Stage, ...] = ("llm", "flow")
FORMATS: tuple[FormatName, ...] = ("int8", "nf4", "fp4", "bf16")  # with these, what is not tuned is the same with any
# Layers with one input. The engine `fused` multiplies them as one matrix, which unlike formats cannot be.
TOGETHER = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"to_q", "to_k", "to_v"})


@dataclass(frozen=True)
class Choice:
    """A format that all of a unit's modules have then, their bytes, and those of the weights among them."""

    format: Format
    bytes: int
    weight_bytes: int


@dataclass(frozen=True)
class Unit:
    """Modules of one kind, side by side, that are stored alike; `choices` by bytes, the smallest first."""

    modules: tuple[Module, ...]
    choices: tuple[Choice, ...]

    @property
    def name(self) -> str:
        """The first module's, and of the others' the last parts."""
        return "+".join([self.modules[0].name, *(module.name.rpartition(".")[2] for module in self.modules[1:])])

    @property
    def stage(self) -> Stage:
        return self.modules[0].stage  # type: ignore[return-value]

    @property
    def weights(self) -> int:
        """How many of a matrix'; an embedding has none."""
        shapes = [module.parameters["weight"] for module in self.modules if module.kind == "matrix"]
        return sum(rows * width for rows, width in shapes)


@dataclass(frozen=True)
class Choices:
    """Everything to be decided, and what is not: its bytes, and the formats of what is not always exact."""

    units: tuple[Unit, ...]
    fixed: int
    untouched: dict[str, Format]

    @property
    def smallest(self) -> int:
        return self.fixed + sum(unit.choices[0].bytes for unit in self.units)

    @property
    def largest(self) -> int:
        return self.fixed + sum(unit.choices[-1].bytes for unit in self.units)

    @property
    def weights(self) -> int:
        return sum(unit.weights for unit in self.units)

    @property
    def rest(self) -> int:
        """The least that all but the matrices' weights can take."""
        return self.smallest - sum(unit.choices[0].weight_bytes for unit in self.units if unit.weights)


def with_default(recipe: Recipe, stage: str, name: FormatName) -> Recipe:
    """The recipe with another format for a stage. Options of 4-bit formats stay with the stage."""
    options = getattr(recipe.stages, stage).model_copy(update={"weights": name})
    return recipe.model_copy(update={"stages": recipe.stages.model_copy(update={stage: options})})


def find_choices(recipe: Recipe, modules: list[Module], formats: Sequence[FormatName]) -> Choices:
    """The units of the language model and of the flow: matrices and embeddings that no rule of the recipe decides.

    A stage's small entry and exit layers and its convolutions are 16-bit floats, as in every recipe that packs.

    Raises:
        RecipeError: a rule does not fit, or nothing is left to choose.
    """
    packed = with_default(with_default(recipe, "llm", "int8"), "flow", "int8")
    decisions = make_plan(packed, modules)
    free = [d.module for d in decisions if _is_free(packed, d.module)]
    units = []
    for _, group in groupby(free, _together):
        found = tuple(group)
        choices = {c.format: c for name in formats if (c := _choice(packed, found, name))}
        if len(choices) > 1:
            units.append(Unit(found, tuple(sorted(choices.values(), key=lambda c: c.bytes))))
    if not units:
        raise RecipeError("leaves nothing to choose", where=recipe.name, remedy="give more --formats, or fewer rules")
    chosen = {module.name for unit in units for module in unit.modules}
    rest = [d for d in decisions if d.module.name not in chosen]
    untouched = {d.module.name: d.format for d in rest if d.module.kind != "exact"}
    return Choices(tuple(units), sum(d.bytes for d in rest), untouched)


def _is_free(recipe: Recipe, module: Module) -> bool:
    tuned = module.stage in TUNED and module.kind in ("matrix", "embedding")
    return tuned and not any(matches(rule, module.name) for rule in recipe.rules)


def _together(module: Module) -> tuple[str, Any]:
    parent, _, leaf = module.name.rpartition(".")
    return parent, next((index for index, leaves in enumerate(TOGETHER) if leaf in leaves), leaf)


def _choice(recipe: Recipe, modules: tuple[Module, ...], name: FormatName) -> Choice | None:
    """None where they cannot be that."""
    options = getattr(recipe.stages, modules[0].stage).model_copy(update={"weights": name})
    if modules[0].kind == "embedding" and name in FOUR_BIT:
        return None
    fmt = fit(named(options), modules[0])
    weight_bytes = sum(stored_bytes(stored_tensors(fmt, module.parameters["weight"])) for module in modules)
    return Choice(fmt, sum(stored_bytes(module_tensors(module, fmt)) for module in modules), weight_bytes)
