"""Products of codes, in Triton's interpreter, against whole numbers."""

import interpreter  # noqa: F401
import pytest
import torch
import torch.nn.functional as F
from conftest import relative

from cosyq.kernels import dit
from cosyq.kernels.flow_products import TILES, fits, times_codes
from cosyq.quantize.formats import INT8_STEP

EXACT = 1e-6  # float32: a product with two scales, and a sum
WIDTH = 256
CASES = [(1348, 1536), (742, 1152), (100, 384)]  # rows and outputs, for one shape of tiles each


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


def given(rows, outputs):
    """Inputs, weights, bias, and their product, of which the sums are exact."""
    x, weight = (torch.randint(-127, 128, (n, WIDTH), dtype=torch.int8) for n in (rows, outputs))
    steps, absmax, bias = torch.rand(rows) * 0.02, torch.rand(outputs) * 0.2, torch.randn(outputs)
    sums = x.long() @ weight.long().T
    return (x, steps), (weight, absmax), bias, sums * steps.double()[:, None] * (absmax.double() * INT8_STEP) + bias


def test_every_shape_of_tiles_is_tested():
    found = [next(t for t in TILES if -(-rows // t[0]) * (outputs // t[1]) >= t[-1]) for rows, outputs in CASES]
    assert found == list(TILES)


@pytest.mark.parametrize(("rows", "outputs", "gelu"), [(*CASES[0], False), (*CASES[1], True), (*CASES[2], False)])
def test_sums_of_codes_are_exact(rows, outputs, gelu):
    x, weight, bias, expected = given(rows, outputs)
    out = torch.full((rows, outputs), float("nan"))
    times_codes(x, weight, bias, out, gelu=gelu)
    assert relative(out, F.gelu(expected, approximate="tanh") if gelu else expected) < EXACT


def test_which_matrices_fit():
    assert fits(3072, 1024)
    assert not fits(3072, 1024 + 128)
    assert not fits(3072 + 64, 1024)


@pytest.mark.parametrize("dim", [256, 320])
def test_a_norm_rounds_its_rows(dim):
    """To the nearest code, the largest of a row being 127; a row of zeros stays one."""
    x, scale, shift = torch.randn(8, dim) * 3 + 1, torch.randn(dim), torch.randn(dim)
    plain, codes, steps = torch.empty(8, dim), torch.empty(8, dim, dtype=torch.int8), torch.empty(8)
    dit.add_norm(x, None, scale, shift, plain, 1e-6)
    dit.add_norm(x, None, scale, shift, (codes, steps), 1e-6)
    assert relative(steps, plain.abs().amax(1) / 127) < EXACT
    assert codes.abs().amax(1).tolist() == [127] * 8
    assert ((codes * steps[:, None] - plain).abs() <= steps[:, None] * 0.5001).all()
    dit.add_norm(torch.zeros(8, dim), None, scale, torch.zeros(dim), (codes, steps), 1e-6)
    assert not codes.any()
    assert torch.isfinite(steps).all()
