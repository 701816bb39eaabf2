"""Which utterances are worth hearing: those that lost the most words, then those that sound the most different."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cosyq.eval.evaluation import Compared, Evaluation
from cosyq.eval.metrics import CHAIN_LSD, ERRORS

RULE = (
    "First the utterances in which the artifact said more words wrong than the reference, by how many more; then those "
    f"of the reference's own ids, by {CHAIN_LSD.title}."
)


@dataclass(frozen=True)
class Heard:
    """An utterance, and why it is shown."""

    compared: Compared
    reason: str


def worst(evaluation: Evaluation, count: int) -> list[Heard]:
    """At most `count`, the worst first; equals in the order of text, voice and seed."""
    words = [(_more_errors(item), item) for item in evaluation.spoken]
    sound = [(item.artifact.values.get(CHAIN_LSD.key, 0.0), item) for item in evaluation.exact]
    found = [Heard(item, f"{more:+.3g} {ERRORS.unit} of its words wrong") for more, item in _sorted(words)]
    found += [Heard(item, f"{far:.3g} {CHAIN_LSD.unit} from the reference") for far, item in _sorted(sound)]
    return found[:count]


def _more_errors(item: Compared) -> float:
    return item.artifact.values.get(ERRORS.key, 0.0) - item.reference.values.get(ERRORS.key, 0.0)


def _sorted(ranked: Iterable[tuple[float, Compared]]) -> list[tuple[float, Compared]]:
    """Those above zero; what is not a number is worse than any."""
    bad = [(value, item) for value, item in ranked if not value <= 0]
    return sorted(bad, key=lambda pair: (pair[0] == pair[0], -pair[0], pair[1].text, pair[1].voice, pair[1].seed))
