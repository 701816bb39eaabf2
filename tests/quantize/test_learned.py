import bitsandbytes.functional as bnb
import pytest
import torch
from test_calibrated import CPU, FORMATS, layer

from cosyq.quantize.calibrated import pack_calibrated, weighted_error
from cosyq.quantize.formats import Format, dequantize, four_bit, stored_tensors
from cosyq.quantize.learned import LearnedCodes
from cosyq.quantize.pack import pack

ODD = [four_bit("nf4", 32), four_bit("fp4", 128, False)]


def learned(fmt, steps, rate=0.002, pull=lambda lost, moment: lost @ moment):
    """From plain packing, down the gradient of the squared error on the inputs."""
    weight, moment = layer()
    tensors = pack(weight, fmt, CPU)[0]
    codes = LearnedCodes(weight, moment, fmt, tensors)
    for step in range(steps):
        codes.step(pull(codes.weight() - weight, moment), rate * (1 - step / steps))
    return weight, moment, tensors, codes


@pytest.mark.parametrize("fmt", [*FORMATS, *ODD], ids=str)
def test_it_begins_as_packed(fmt):
    weight, _, tensors, codes = learned(fmt, 0)
    torch.testing.assert_close(codes.weight(), dequantize(fmt, tensors, (48, 256)), rtol=1e-6, atol=1e-8)
    if fmt.name != "fp4":  # which has two codes for zero
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in codes.tensors().items())
    zero = LearnedCodes(weight * 0, layer()[1], fmt, pack(weight * 0, fmt, CPU)[0])
    zero.step(weight, 1.0)
    assert zero.weight().abs().max() == 0


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_what_was_learned_is_stored_in_codes_alone(fmt):
    _, _, before, codes = learned(fmt, 20)
    made = codes.tensors()
    assert {k: (v.dtype, tuple(v.shape)) for k, v in made.items()} == stored_tensors(fmt, (48, 256))
    assert {name for name in made if not torch.equal(made[name], before[name])} == {"weight"}
    if fmt.name == "int8":
        theirs = bnb.int8_vectorwise_dequant(made["weight"], made["SCB"])
    else:
        parts = {k.removeprefix("weight."): v for k, v in made.items() if k != "weight"}
        theirs = bnb.dequantize_4bit(made["weight"], bnb.QuantState.from_dict(parts, CPU))
    assert torch.equal(dequantize(fmt, made, (48, 256)), theirs)
    torch.testing.assert_close(codes.weight(), theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_it_goes_down_the_gradient(fmt):
    """Measured: 0.68 to 0.70 of plain rounding's squared error."""
    weight, moment, plain, codes = learned(fmt, 50)
    before, after = (weighted_error(t, weight, moment, fmt, CPU) for t in (plain, codes.tensors()))
    assert after**2 < 0.8 * before**2


def test_a_gradient_that_is_zero_changes_nothing():
    *_, before, codes = learned(four_bit("nf4"), 3, pull=lambda lost, moment: lost * 0)
    assert torch.equal(codes.tensors()["weight"], before["weight"])


def test_what_matters_to_no_input_changes_last():
    """A weight between two codes that are as good for its layer is the first that a gradient moves to the other."""
    fmt = four_bit("nf4", 64, False)
    weight, moment = layer()
    tensors = pack_calibrated(weight, moment, fmt, CPU).tensors
    codes = LearnedCodes(weight, moment, fmt, tensors)
    before = codes.weight()
    noise = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    codes.step(noise, 0.05)
    changed = codes.weight() != before
    assert 0.001 < changed.float().mean() < 0.05
    worse = codes.weight() - weight
    flipped = ((worse @ moment) * worse).sum() / (((before - weight) @ moment) * (before - weight)).sum()
    anywhere = before.clone()
    places = torch.randperm(before.numel(), generator=torch.Generator().manual_seed(1))[: int(changed.sum())]
    anywhere.view(-1)[places] += (codes.weight() - before)[changed]
    lost = anywhere - weight
    assert flipped < ((lost @ moment) * lost).sum() / (((before - weight) @ moment) * (before - weight)).sum()


def test_int8_moves_by_its_own_levels():
    _, _, before, codes = learned(Format("int8"), 1, rate=1.0)
    moved = (codes.tensors()["weight"].int() - before["weight"].int()).abs()
    assert 0 < moved.max() <= 10
