"""docs/quality.py makes the rows of docs/numbers.md from what `cosyq eval --json` says."""

import importlib.util
import re

import pytest
from conftest import REPOSITORY

from cosyq.eval.metrics import EXACT, SPOKEN

DOCS = REPOSITORY / "docs"


@pytest.fixture(scope="module")
def quality():
    specification = importlib.util.spec_from_file_location("quality", DOCS / "quality.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def finding(unit, value, low, high, *, reference=False):
    between = {"value": value, "low": low, "high": high}
    return {"unit": unit, "difference": between, "reference": between if reference else None}


def test_a_row_has_a_cell_for_every_metric(quality):
    findings = {metric.key: finding(metric.unit, 0.0, 0.0, 0.0) for metric in EXACT}
    findings |= {
        "llm.kl": finding("nats", 0.10811, 0.10461, 0.11179),
        "llm.nll": finding("nats", 0.1211, -0.1096, 0.1334, reference=True),
    }
    del findings["llm.stop"]
    first, second = quality.tables({"nf4": {"bytes": 14_049_000, "findings": findings}}).split("\n\n")
    assert first.splitlines()[0] == "|  | MB | llm.kl (nats) | llm.top1 (%) | llm.nll (nats) | llm.stop |"
    assert first.splitlines()[2] == "| nf4 | 14.0 | 0.108 (0.105 to 0.112) | 0 | +0.121 (-0.11 to +0.133) |  |"
    assert second.splitlines()[2] == "| nf4 | 14.0 | 0 | 0 | 0 | 0 | 0 |"


def test_its_columns_are_those_of_the_numbers(quality):
    shown = re.findall(r"^\| *\| MB \|(.*)\|$", (DOCS / "numbers.md").read_text("utf-8"), re.M)
    keys = [cell.split(" (")[0].strip() for line in shown for cell in line.split("|")]
    assert keys == [key for table in quality.TABLES for key in table]
    assert sorted(keys) == sorted(metric.key for metric in (*EXACT, *SPOKEN))
