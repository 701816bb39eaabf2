"""The layers that multiply by packed weights, against the weights they stand for."""

import pytest
import torch
import torch.nn.functional as F

from cosyq.quantize.formats import Format, four_bit
from cosyq.quantize.linear import FEW, DequantLinear, RowsLinear, multiplies_bfloat16, packed_linear
from cosyq.quantize.pack import pack

CPU = torch.device("cpu")


def packed(fmt, out, width, bias=True):
    draw = torch.Generator().manual_seed(0)
    tensors, _ = pack(torch.randn(out, width, generator=draw), fmt, CPU)
    return tensors, torch.randn(out, generator=draw) if bias else None


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("out", "width"), [(96, 64), (97, 160), (33, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_int8_give_what_their_weights_would(monkeypatch, units, bias, out, width, dtype):
    """Inputs and sums have bfloat16's eight bits: 2^-9 of each at most, 0.2 % of the whole by chance."""
    monkeypatch.setattr("cosyq.quantize.linear.multiplies_bfloat16", lambda: units)
    fmt = Format("int8")
    tensors, offset = packed(fmt, out, width, bias)
    layer = packed_linear(fmt, (out, width), tensors, offset, matmul="native", dtype=dtype)
    assert isinstance(layer, RowsLinear)
    plain = DequantLinear(fmt, (out, width), tensors, offset)
    for rows in (1, FEW, FEW + 1, 3 * FEW):
        x = torch.randn(2, rows // 2 or 1, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
        found, wanted = layer(x), plain(x.float())
        assert found.shape == wanted.shape
        assert found.dtype == dtype
        assert (found.float() - wanted).norm() / wanted.norm() < 0.005


def test_a_row_of_inputs_does_not_depend_on_its_neighbours():
    fmt = Format("int8")
    tensors, bias = packed(fmt, 96, 128)
    layer = packed_linear(fmt, (96, 128), tensors, bias, matmul="native", dtype=torch.bfloat16)
    x = torch.randn(FEW, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    together = layer(x)
    for row in range(FEW):
        assert torch.equal(layer(x[row : row + 1]), together[row : row + 1])


@pytest.mark.parametrize(("fmt", "width"), [(Format("int8"), 200), (four_bit("nf4", 64, True), 128)])
def test_what_the_kernel_does_not_take_is_unpacked(fmt, width):
    """Of rows that are no multiple of 16 it reads past the end."""
    tensors, bias = packed(fmt, 64, width)
    layer = packed_linear(fmt, (64, width), tensors, bias, matmul="native", dtype=torch.float32)
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    assert type(layer) is torch.nn.Linear
    torch.testing.assert_close(layer(x), F.linear(x, DequantLinear(fmt, (64, width), tensors, bias).weight(), bias))


def test_bfloat16_is_chosen_where_there_are_units_for_it(monkeypatch):
    from cosyq.runtime import engine

    for units, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(engine, "multiplies_bfloat16", lambda units=units: units)
        assert engine.pick_dtype("auto", CPU) == dtype
    assert isinstance(multiplies_bfloat16(), bool)
