"""A recipe's gate: what must be known of an artifact before it is let through. It reads findings and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cosyq.errors import RecipeError
from cosyq.eval.evaluation import Evaluation
from cosyq.eval.metric import Finding, Interval
from cosyq.eval.metrics import ERRORS, METRICS, MOS, TRUNCATED
from cosyq.eval.wording import harm, written
from cosyq.recipe import Limit, Recipe

MORE_BITS = "give it more bits, by a rule or another format, or loosen the gate"
MORE_ITEMS = "its value keeps to it and its interval does not: measure more sequences"
NOT_MEASURED = "measure what it needs, or take it out of the gate"


@dataclass(frozen=True)
class Miss:
    """A limit that an artifact does not keep to: the metric, what was found, what is allowed, what can be done."""

    key: str
    found: str
    allowed: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.key} {self.found}, allowed {self.allowed}"


def check(recipe: Recipe) -> None:
    """Before a weight is read.

    Raises:
        RecipeError: a gate names a metric that there is not, or one that nothing in `evaluate` measures.
    """
    for key in recipe.gate:
        if key not in METRICS:
            raise RecipeError("no such metric", where=f"gate.{key}", remedy=f"there are {', '.join(METRICS)}")
    if recipe.evaluate.recognizer is None and (named := sorted({ERRORS.key, TRUNCATED.key} & recipe.gate.keys())):
        remedy = "add evaluate: {recognizer: pocketsphinx}, or whisper"
        raise RecipeError("needs a recognizer", where=f"gate.{named[0]}", remedy=remedy)
    if MOS.key in recipe.gate and not recipe.evaluate.mos:
        raise RecipeError("needs a predictor", where=f"gate.{MOS.key}", remedy="add evaluate: {mos: true}")


def misses(gate: Mapping[str, Limit], evaluation: Evaluation) -> list[Miss]:
    """The limits that are not kept, in the gate's order.

    What counts is the end of the 95 % interval that is worse for the limit: too few utterances never let an artifact
    through. Neither does a metric that was not measured, or that is not a number.
    """
    found = {finding.metric.key: finding for finding in evaluation.findings}
    missed: list[Miss] = []
    for key, limit in gate.items():
        if finding := found.get(key):
            missed += _misses(limit, finding)
        else:
            missed.append(Miss(key, "was not measured", _allowed(limit), NOT_MEASURED))
    return missed


def _misses(limit: Limit, finding: Finding) -> Iterator[Miss]:
    key, unit, value = finding.metric.key, finding.metric.unit, finding.artifact
    kept = finding.needed is not None  # of one item there is no interval
    if limit.max is not None and not (kept and value.high <= limit.max):
        yield _miss(key, value, f"at most {limit.max:g} {unit}", value.value <= limit.max)
    if limit.min is not None and not (kept and value.low >= limit.min):
        yield _miss(key, value, f"at least {limit.min:g} {unit}", value.value >= limit.min)
    if limit.max_difference is not None:
        difference = finding.difference
        _, worst = harm(finding.metric, difference)
        if not (kept and worst <= limit.max_difference):
            _, likely = harm(finding.metric, Interval(difference.value, difference.value, difference.value))
            allowed = f"worse by at most {limit.max_difference:g} {unit}"
            yield _miss(key, difference, allowed, likely <= limit.max_difference, signed=finding.reference is not None)


def _miss(key: str, found: Interval, allowed: str, uncertain: bool, *, signed: bool = False) -> Miss:
    remedy = MORE_ITEMS if uncertain else MORE_BITS
    return Miss(key, f"is {written(found, signed=signed)}", allowed.strip(), remedy)


def _allowed(limit: Limit) -> str:
    bounds = limit.model_dump(exclude_none=True)
    return ", ".join(f"{name} {bound:g}" for name, bound in bounds.items())
