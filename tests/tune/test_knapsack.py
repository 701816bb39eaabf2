"""The choice against all choices there are, on instances small enough to try them."""

import random
from itertools import pairwise, product

import pytest

from cosyq.tune import knapsack
from cosyq.tune.knapsack import Option, allocate, part


def instance(seed):
    """Up to five units of up to four options, some of which are worse and larger than others, and room for some."""
    draw = random.Random(seed)
    units = [
        [Option(draw.randint(1, 60), draw.choice([0.0, draw.random(), draw.random() ** 4])) for _ in range(draw.randint(1, 4))]
        for _ in range(draw.randint(1, 5))
    ]  # fmt: skip
    least = sum(min(option.bytes for option in options) for options in units)
    most = sum(max(option.bytes for option in options) for options in units)
    return units, least, draw.randint(least, most + 5)


def total(units, picks):
    chosen = [options[index] for options, index in zip(units, picks, strict=True)]
    return sum(option.bytes for option in chosen), sum(option.cost for option in chosen)


def best(units, room):
    sums = (total(units, picks) for picks in product(*(range(len(options)) for options in units)))
    return min(cost for size, cost in sums if size <= room)


@pytest.mark.parametrize("seed", range(60))
def test_nothing_is_better_within_the_room(seed):
    units, _, room = instance(seed)
    assert part(units) == 1
    size, cost = total(units, allocate(units, room))
    assert size <= room
    assert cost == pytest.approx(best(units, room), abs=1e-12)


@pytest.mark.parametrize("seed", range(60))
def test_with_coarse_parts_it_is_as_good_as_said(seed, monkeypatch):
    monkeypatch.setattr(knapsack, "PARTS", 16)
    units, least, room = instance(seed)
    size, cost = total(units, allocate(units, room))
    assert size <= room
    assert cost <= best(units, max(room - len(units) * part(units), least)) + 1e-12


def test_coarse_parts_are_met_at_all(monkeypatch):
    monkeypatch.setattr(knapsack, "PARTS", 16)
    assert max(part(instance(seed)[0]) for seed in range(60)) > 5


@pytest.mark.parametrize("parts", [16, 1 << 17])
def test_more_room_never_costs_more(parts, monkeypatch):
    monkeypatch.setattr(knapsack, "PARTS", parts)
    for seed in range(10):
        units, least, _ = instance(seed)
        costs = [total(units, allocate(units, room))[1] for room in range(least, least + 250)]
        assert all(later <= earlier + 1e-12 for earlier, later in pairwise(costs))
        assert costs[-1] == pytest.approx(sum(min(option.cost for option in options) for options in units))


def test_of_equals_the_smaller_is_taken():
    units = [[Option(10, 1.0), Option(4, 1.0), Option(2, 3.0)], [Option(5, 0.0), Option(1, 0.0)]]
    assert allocate(units, 100) == [1, 1]
    assert allocate(units, 14) == [1, 1]
    assert allocate(units, 3) == [2, 1]


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="take 3 bytes"):
        allocate([[Option(2, 0.0)], [Option(1, 0.0), Option(9, 0.0)]], 2)
