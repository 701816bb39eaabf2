"""What a GPU is told to multiply words of codes by: the instructions run here, over exact integers."""

import numpy as np
import pytest
import torch

from cosyq.kernels.packed import (
    FOUR_BIT_DOT,
    FOUR_BIT_VALUES,
    IN_BYTES,
    INT8_DOT,
    LEVELS,
    OWN,
    STEPS,
    SUM_OF_BYTES,
    planes,
)


def signed(word: int) -> list[int]:
    return [(word >> 8 * i & 255) - (word >> 8 * i & 128) * 2 for i in range(4)]


def permuted(a: int, b: int, selector: int) -> int:
    """`prmt`: four bytes of eight; the top bit of a nibble asks for the byte's sign instead."""
    given = [word >> 8 * i & 255 for word in (a, b) for i in range(4)]
    picks = [(given[selector >> 4 * i & 7], selector >> 4 * i & 8) for i in range(4)]
    return sum((255 * (byte >> 7) if sign else byte) << 8 * i for i, (byte, sign) in enumerate(picks))


def whole(word: int) -> int:
    """The number with a sign that 32 bits are."""
    return (word & 0x7FFFFFFF) - (word & 0x80000000)


OPERATIONS = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shr": lambda a, b: a >> b,
    "add": lambda a, b: a + b & 0xFFFFFFFF,
    "mad": lambda a, b, c: whole(a * b + c),
    "prmt": lambda a, b, selector: permuted(a, b, selector & 0xFFFF),
    "dp4a": lambda a, b, total: total + sum(x * y for x, y in zip(signed(a), signed(b), strict=True)),
}


def run(instructions: str, outputs: int, *inputs: int) -> list[int]:
    """What they leave in $0 and on, given what is behind it."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)} | {"%laneid": 5}
    for line in filter(None, (line.strip() for line in instructions.strip("{} ").split(";"))):
        name, _, operands = line.partition(" ")
        if not name.startswith(".reg"):
            to, *given = (operand.strip() for operand in operands.split(","))
            values = [registers[x] if x in registers else int(x, 0) for x in given]
            registers[to] = OPERATIONS[name.split(".")[0]](*values)
    return [registers[f"${i}"] for i in range(outputs)]


def word(values: np.ndarray) -> int:
    return sum((int(value) & 255) << 8 * i for i, value in enumerate(values))


def in_bytes(inputs: np.ndarray) -> tuple[int, int]:
    """Words of the low and of the high bytes of four inputs, whole numbers up to `LEVELS`."""
    low, high = run(IN_BYTES, 2, *(int(x) for x in (inputs + 1.5 * 2**23).astype(np.float32).view(np.uint32)))
    return low, high


def levels(inputs: np.ndarray) -> tuple[np.ndarray, float]:
    step = np.abs(inputs).max() / LEVELS
    return np.round(inputs / step), step


def test_two_bytes_of_inputs():
    inputs = np.array([LEVELS, -LEVELS, 0, -1, 1, 127, 128, -128, -129, 255, 256, 12345])
    for four in inputs.reshape(-1, 4):
        low, high = in_bytes(four)
        assert [256 * h + x for h, x in zip(signed(high), signed(low), strict=True)] == four.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_eight_codes_of_four_bits(seed):
    rng = np.random.default_rng(seed)
    table = rng.uniform(-1, 1, 16)
    table[[0, -1]] = -1, 1
    codes, inputs = rng.integers(0, 16, 8), rng.normal(size=8)
    *picked_from, zero = (int(x) for x in planes(tuple(table), torch.device("cpu")))
    assert [run(OWN, 1, x, zero) for x in picked_from] == [[x] for x in picked_from]
    values = run(FOUR_BIT_VALUES, 4, word(codes[::2] << 4 | codes[1::2]), *picked_from)
    whole_inputs, step = levels(inputs)
    (low, high), (more_low, more_high) = (in_bytes(half[[1, 0, 3, 2]]) for half in (whole_inputs[:4], whole_inputs[4:]))
    [found] = run(FOUR_BIT_DOT, 1, *values, high, more_high, low, more_low)
    highs, lows = run(SUM_OF_BYTES, 2, high, more_high, low, more_low)
    found = (found - highs * STEPS - lows * (STEPS - 127) / 256) * 256 / STEPS * step
    # inputs and weights are rounded to half a level; low bytes of weights are taken for 63.5 where they meet low bytes
    error = 8 * (0.5 + 63.5 * 128 / (STEPS / 2)) * step + np.abs(inputs).sum() / STEPS
    assert abs(found - table[codes] @ inputs) < error


def test_four_bytes():
    rng = np.random.default_rng(0)
    codes, inputs = rng.integers(-127, 128, 4), rng.normal(size=4)
    whole_inputs, step = levels(inputs)
    low, high = in_bytes(whole_inputs)
    found = run(INT8_DOT, 2, word(codes), high, low)
    assert abs((found[0] * 256 + found[1]) * step - codes @ inputs) <= 0.5 * step * np.abs(codes).sum()
