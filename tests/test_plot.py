"""The README's plot is what the table of docs/numbers.md says."""

import importlib.util
import re
from xml.etree import ElementTree

import pytest
from conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def plot():
    specification = importlib.util.spec_from_file_location("plot", DOCS / "plot.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_it_is_up_to_date(plot):
    rows = plot.first_table((DOCS / "numbers.md").read_text("utf-8"))
    assert plot.draw(rows) == (DOCS / "numbers.svg").read_text("utf-8"), "python docs/plot.py"
    assert [row[0] for row in rows[1:]] == ["original", "fp32", "bf16", "hybrid", "int8", "nf4"]


def test_its_sizes_are_the_readmes():
    """The one figure that stands in both."""
    numbers = (DOCS / "numbers.md").read_text("utf-8")
    readme = re.findall(r"^\| `(\w+)` \|.*\| ([\d,]+) MB \|$", (REPOSITORY / "README.md").read_text("utf-8"), re.M)
    assert len(readme) == 5
    for recipe, size in readme:
        assert f"| {recipe} | {size} |" in numbers


def test_bars_are_as_long_as_their_numbers(plot):
    rows = plot.first_table(
        "text\n\n| | a (s) | b < c |\n|---|---|---|\n| x | 1,000 | 1.5 to 3 |\n| y | 250 | none yet |\n\n| no |\n"
    )
    assert rows == [["", "a (s)", "b < c"], ["x", "1,000", "1.5 to 3"], ["y", "250", "none yet"]]
    found = ElementTree.fromstring(plot.draw(rows))
    bars = [(bar.get("class"), float(bar.get("width"))) for bar in found.iter(f"{SVG}rect")]
    assert bars == [("bar", plot.BAR), ("bar", plot.BAR / 4), ("bar", plot.BAR / 2), ("spread", plot.BAR / 2)]
    texts = [text.text for text in found.iter(f"{SVG}text")]
    assert texts == ["x", "y", "a (s)", "1,000", "250", "b < c", "1.5 to 3", "none yet"]


@pytest.mark.parametrize("cell", ["", "not measured", "-", "under 5", "1 2 3"])
def test_what_is_no_figure(plot, cell):
    assert plot.value(cell) is None
