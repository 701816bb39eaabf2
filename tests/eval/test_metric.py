"""Intervals cover what they promise, pairs are surer than halves, and the number of items that a claim needs is right."""

import numpy as np
import pytest

from cosyq.eval.metric import Metric, Series, judge

METRIC = Metric("test.metric", "a test", "", "lower", 0.5)


def series(artifact, weights=None, reference=None, other_weights=None):
    artifact = np.asarray(artifact, dtype=np.float64)
    weights = np.ones_like(artifact) if weights is None else np.asarray(weights, dtype=np.float64)
    if reference is not None:
        reference = np.asarray(reference, dtype=np.float64)
        other_weights = weights if other_weights is None else np.asarray(other_weights, dtype=np.float64)
    return Series(METRIC, artifact, weights, reference, other_weights)


def test_the_value_is_totals_over_weights():
    found = judge(series([1, 9], [10, 30], [2, 2], [10, 10]))
    assert found.artifact.value == pytest.approx(0.25)
    assert found.reference.value == pytest.approx(0.2)
    assert found.difference.value == pytest.approx(0.05)
    assert found.items == 2
    alone = judge(Series.of_means(METRIC, [1.0, 2.0, 6.0]))
    assert (alone.reference, alone.difference) == (None, alone.artifact)
    assert alone.artifact.value == 3


def test_the_same_series_gives_the_same_finding_and_a_constant_one_no_width():
    items = np.random.default_rng(0).normal(size=30)
    assert judge(series(items)) == judge(series(items))
    assert judge(series(items)) != judge(series(items), seed=1)
    still = judge(Series.of_means(METRIC, [0.0] * 5, [0.0] * 5))
    assert (still.difference.low, still.difference.value, still.difference.high) == (0, 0, 0)
    assert still.needed == 1


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_an_interval_covers_the_truth_as_often_as_it_says(draw):
    rng = np.random.default_rng(1)
    truth = {"normal": 0.0, "exponential": 1.0}[draw]
    hits = 0
    for _ in range(400):
        found = judge(series(getattr(rng, draw)(size=80))).artifact
        hits += found.low <= truth <= found.high
    assert hits / 400 == pytest.approx(0.95, abs=0.03)


def test_a_rate_over_unequal_items_is_covered_too():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(400):
        words = rng.integers(1, 30, 80)
        errors = rng.binomial(words, 0.1)
        found = judge(series(errors, words)).artifact
        hits += found.low <= 0.1 <= found.high
    assert hits / 400 == pytest.approx(0.95, abs=0.03)


def test_pairs_are_surer_than_halves():
    """What is hard for both sides is not uncertainty about their difference."""
    rng = np.random.default_rng(3)
    hard = rng.normal(size=60) * 5
    found = judge(series(hard + 0.3 + rng.normal(size=60) * 0.1, None, hard))
    width = found.difference.high - found.difference.low
    apart = np.hypot(*(side.high - side.low for side in (found.artifact, found.reference)))
    assert width < apart / 20
    assert found.difference.low > 0 > found.artifact.low - found.reference.high


def test_the_items_needed_show_the_claim_four_times_in_five():
    rng = np.random.default_rng(4)

    def pairs(count, effect):
        words, hard = rng.integers(5, 15, count), rng.normal(size=count)
        return series((hard + effect + rng.normal(size=count) * 2) * words, words, hard * words)

    needed = judge(pairs(4000, 0.0)).needed
    shown = 0
    for _ in range(400):
        found = judge(pairs(needed, METRIC.claim)).difference
        shown += found.low > 0 or found.high < 0
    assert 90 < needed < 200
    assert shown / 400 == pytest.approx(0.8, abs=0.06)


def test_one_item_says_nothing_of_the_number_needed():
    assert judge(series([3.0])).needed is None


def test_an_item_without_weight_is_left_out_where_only_such_are_drawn():
    found = judge(series([0, 5], [0, 1]))
    assert (found.artifact.value, found.artifact.low, found.artifact.high) == (5, 5, 5)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (series([]), "0 items"),
        (series([1, 2], [1]), "2 items"),
        (series([1, 2], None, [1], [1]), "2 items"),
        (series([1, 2], [0, 0]), "divide"),
        (series([1, np.nan]), "finite"),
        (series([1, 2], [1, np.inf]), "finite"),
        (Series(METRIC, np.ones(2), np.ones(2), np.ones(2)), "without weights"),
    ],
)
def test_what_cannot_be_judged(broken, said):
    with pytest.raises(ValueError, match=f"test.metric.*{said}"):
        judge(broken)
