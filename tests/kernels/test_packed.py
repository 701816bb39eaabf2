"""What a GPU is told to multiply words of codes by: the instructions run here, over exact integers."""

import numpy as np
import pytest

from cosyq.kernels.packed import INT8_DOT, LEVELS, dot

LIMIT = LEVELS


def signed(word: int) -> list[int]:
    return [(word >> 8 * i & 255) - (word >> 8 * i & 128) * 2 for i in range(4)]


def permuted(a: int, b: int, selector: int) -> int:
    """`prmt`: four bytes of eight; the top bit of a nibble asks for the byte's sign instead."""
    given = [word >> 8 * i & 255 for word in (a, b) for i in range(4)]
    picks = [(given[selector >> 4 * i & 7], selector >> 4 * i & 8) for i in range(4)]
    return sum((255 * (byte >> 7) if sign else byte) << 8 * i for i, (byte, sign) in enumerate(picks))


def chosen(a: int, b: int, where: int, table: int) -> int:
    """`lop3`"""
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | where >> i & 1) & 1) << i for i in range(32))


OPERATIONS = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "shr": lambda a, b: a >> b,
    "prmt": lambda a, b, selector: permuted(a, b, selector & 0xFFFF),
    "lop3": chosen,
    "dp4a": lambda a, b, total: total + sum(x * y for x, y in zip(signed(a), signed(b), strict=True)),
}


def run(instructions: str, *inputs: int) -> list[int]:
    """Two outputs, $0 and $1."""
    registers = {f"${2 + i}": value for i, value in enumerate(inputs)}
    for line in filter(None, (line.strip() for line in instructions.strip("{} ").split(";"))):
        name, _, operands = line.partition(" ")
        if not name.startswith(".reg"):
            to, *given = (operand.strip() for operand in operands.split(","))
            values = [registers[x] if x in registers else int(x, 0) for x in given]
            registers[to] = OPERATIONS[name.split(".")[0]](*values)
    return [registers["$0"], registers["$1"]]


def word(values: np.ndarray) -> int:
    return sum((int(value) & 255) << 8 * i for i, value in enumerate(values))


def two_bytes(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    step = np.abs(inputs).max() / LIMIT
    levels = np.floor(inputs / step + 0.5).astype(int)
    high = (levels + 128) >> 8
    return high, levels - 256 * high, step


@pytest.mark.parametrize("seed", range(20))
def test_eight_codes_of_four_bits(seed):
    rng = np.random.default_rng(seed)
    table = rng.uniform(-1, 1, 16)
    table[[0, -1]] = -1, 1
    codes, inputs = rng.integers(0, 16, 8), rng.normal(size=8)
    high, low, step = two_bytes(inputs)
    swapped = [np.array([1, 0, 3, 2]) + first for first in (0, 4)]
    found = run(dot(table.tolist()), word(codes[::2] << 4 | codes[1::2]),
                *(word(plane[order]) for plane in (high, low) for order in swapped))  # fmt: skip
    found = (found[0] * 256 + found[1]) * 256 / LIMIT * step
    # both are rounded to half a level; the product of two low bytes is left out
    assert abs(found - table[codes] @ inputs) < 8 * (0.5 + 0.5 + 0.5) * step


def test_four_bytes():
    rng = np.random.default_rng(0)
    codes, inputs = rng.integers(-127, 128, 4), rng.normal(size=4)
    high, low, step = two_bytes(inputs)
    found = run(INT8_DOT, word(codes), word(high), word(low))
    assert abs((found[0] * 256 + found[1]) * step - codes @ inputs) <= 0.5 * step * np.abs(codes).sum()
