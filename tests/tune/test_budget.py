"""Budgets as they are written, and what they come to in bytes."""

import pytest

from cosyq.errors import UsageError
from cosyq.tune.budget import parse_budget


@pytest.mark.parametrize(
    ("text", "shown", "limit"),
    [
        ("600MB", "600MB", 600_000_000),
        ("0.6 GB", "0.6GB", 600_000_000),
        ("15.25mb", "15.25MB", 15_250_000),
        ("4.5bpw", "4.5bpw", 100 + 4500),
        ("4bpw", "4bpw", 100 + 4000),
    ],
)
def test_a_budget_in_bytes(text, shown, limit):
    budget = parse_budget(text)
    assert str(budget) == shown
    assert budget.limit(100, 8000) == limit


@pytest.mark.parametrize(
    "text", ["", "600", "MB", "-1MB", "600 KiB", "1e9MB", "nanbpw", "1.MB", "6_0MB", "9999999999MB", "६MB"]
)
def test_what_is_no_budget(text):
    with pytest.raises(UsageError, match=r"600MB or 4\.5bpw"):
        parse_budget(text)
