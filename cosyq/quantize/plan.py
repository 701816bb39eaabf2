"""Recipe x modules -> one decision a module, with the reason written down."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from cosyq.errors import RecipeError
from cosyq.model.inventory import Module
from cosyq.quantize.formats import (
    BLOCKSIZES,
    Format,
    FormatName,
    Specs,
    four_bit,
    module_tensors,
    stored_bytes,
)
from cosyq.recipe import Recipe, Rule

FP32 = Format("fp32")


@dataclass(frozen=True)
class Decision:
    """How one module is stored: its weight's format, and the rule or default that said so."""

    module: Module
    format: Format
    rule: str

    @property
    def tensors(self) -> Specs:
        return module_tensors(self.module, self.format)

    @property
    def bytes(self) -> int:
        return stored_bytes(self.tensors)


def make_plan(recipe: Recipe, modules: list[Module]) -> list[Decision]:
    """Decide for every module: the first rule that matches it, else its stage's format.

    Raises:
        RecipeError: a rule decides nothing, or asks for what a module cannot be.
    """
    used: set[int] = set()
    plan = []
    for module in modules:
        decision = None
        if module.kind != "exact":
            for index, rule in enumerate(recipe.rules):
                if matches(rule, module.name):
                    used.add(index)
                    decision = Decision(module, fit(named(rule), module), f"rules[{index}] {rule.match}")
                    break
        plan.append(decision or _default(recipe, module))
    for index, rule in enumerate(recipe.rules):
        if index not in used:
            raise RecipeError(
                "matches no module that is still undecided",
                where=f"rules[{index}] {rule.match!r}",
                remedy="`cosyq quantize RECIPE --dry-run` without it lists the names",
            )
    return plan


def matches(rule: Rule, name: str) -> bool:
    if rule.match.startswith("re:"):
        try:
            return re.fullmatch(rule.match[3:], name) is not None
        except re.error as error:
            raise RecipeError(f"not a regular expression ({error})", where=f"rule {rule.match!r}") from None
    return fnmatchcase(name, rule.match)


def named(choice: object) -> Format:
    """The format that a stage or a rule of the recipe names."""
    name: FormatName = choice.weights  # type: ignore[attr-defined]
    if name not in ("nf4", "fp4"):
        return Format(name)
    blocksize, double_quant = choice.blocksize, choice.double_quant  # type: ignore[attr-defined]
    return four_bit(name, blocksize or 64, True if double_quant is None else double_quant)


def _default(recipe: Recipe, module: Module) -> Decision:
    """A packed stage packs its matrices; what enters and leaves it, and its convolutions, stay in 16 bits.

    Embeddings are looked up, not multiplied: a row in int8 costs nothing in speed.
    """
    stage = getattr(recipe.stages, module.stage)
    wanted, rule = named(stage), f"stages.{module.stage}"
    if module.kind == "exact":
        return Decision(module, FP32, "always exact")
    if wanted.is_float or module.kind == "matrix":
        return Decision(module, fit(wanted, module), rule)
    fallback = Format("int8") if module.kind == "embedding" else Format("bf16")
    return Decision(module, fallback, f"{rule} ({module.kind})")


def fit(fmt: Format, module: Module) -> Format:
    """The format as this module can hold it.

    A 4-bit block shrinks until it divides a row: bitsandbytes' CPU kernels (0.50) restart their blocks at
    each row and read weights whose rows are not whole blocks wrongly.
    """
    if fmt.is_float:
        return fmt
    possible = {"conv": "bf16, fp16 or fp32", "embedding": "int8, bf16, fp16 or fp32"}
    shape = module.parameters["weight"]
    embedding = module.kind == "embedding" or module.name == "flow.token_embedding"
    if module.kind == "conv" or (embedding and fmt.is_four_bit):
        raise RecipeError(
            f"{module.name} is {'an embedding' if embedding else 'a convolution'} and cannot be {fmt.name}",
            remedy=f"use {possible['embedding' if embedding else 'conv']}, or a narrower match",
        )
    if fmt.is_four_bit and fmt.blocksize is not None and shape[1] % fmt.blocksize:
        fitting = [size for size in BLOCKSIZES if size <= fmt.blocksize and shape[1] % size == 0]
        return replace(fmt, blocksize=max(fitting, default=fmt.blocksize))
    return fmt
