"""What only a GPU can show: run with `pytest -m gpu tests/gpu` on a CUDA machine."""

import pytest
import torch
from conftest import make_artifact, relative

import cosyq
from cosyq.artifact.reader import open_artifact
from cosyq.quantize.formats import Format, dequantize, four_bit
from cosyq.quantize.pack import pack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
CUDA = torch.device("cuda")
FORMATS = [Format("int8"), *(four_bit(n, b, d) for n in ("nf4", "fp4") for b in (64, 128) for d in (False, True))]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(896, 4864), (1024, 320), (96, 160), (33, 70)])
def test_dequantized_weights_equal_bitsandbytes_exactly(fmt, shape):
    import bitsandbytes.functional as bnb

    packed, _ = pack(torch.randn(shape) * 0.02, fmt, CUDA)
    placed = {name: tensor.cuda() for name, tensor in packed.items()}
    ours = dequantize(fmt, placed | {n: packed[n] for n in packed if "quant_state" in n}, shape)
    if fmt.name == "int8":
        theirs = bnb.int8_vectorwise_dequant(placed["weight"], placed["SCB"])
    else:
        parts = {n.removeprefix("weight."): t for n, t in placed.items() if n != "weight"}
        theirs = bnb.dequantize_4bit(placed["weight"], bnb.QuantState.from_dict(parts, device=CUDA))
    assert torch.equal(ours, theirs.view(shape))
    assert torch.equal(ours.cpu(), dequantize(fmt, packed, shape))  # and on the CPU


@pytest.mark.parametrize("recipe", ["int8", "nf4"])
def test_packed_on_the_gpu_spoken_on_both(tmp_path, voice, recipe):
    artifact = make_artifact(tmp_path / "gpu", recipe, device=CUDA)
    again = make_artifact(tmp_path / "again", recipe, device=CUDA)
    for name in open_artifact(artifact).manifest.files:
        assert (artifact / name).read_bytes() == (again / name).read_bytes()
    assert (artifact / "manifest.json").read_bytes() == (again / "manifest.json").read_bytes()
    tokens = list(range(100, 160))

    def mel(device, dtype, engine):
        tts = cosyq.load(artifact, device=device, dtype=dtype, engine=engine)
        return tts.engine.mel(tokens, voice, streaming=False, final=True, steps=10).cpu()

    oracle = mel("cpu", "fp32", "reference")
    errors = {
        (dtype, engine): relative(mel("cuda", dtype, engine), oracle)
        for dtype in ("fp32", "bf16")
        for engine in ("reference", "bnb")
    }
    print(recipe, errors)
    assert errors["fp32", "reference"] < 1e-3  # sums in another order
    assert errors["bf16", "reference"] < 0.05  # products of 8-bit mantissas through ten steps
    assert errors["bf16", "bnb"] < 0.1  # and, for int8, activations rounded to eight bits


@pytest.mark.parametrize("recipe", ["int8", "nf4"])
def test_the_device_that_packs_does_not_change_the_error(tmp_path, recipe):
    """bitsandbytes breaks ties differently on the two, so bytes may differ; what they lose may not."""
    cpu = open_artifact(make_artifact(tmp_path / "cpu", recipe)).manifest.modules
    gpu = open_artifact(make_artifact(tmp_path / "gpu", recipe, device=CUDA)).manifest.modules
    for here, there in zip(cpu, gpu, strict=True):
        assert there.rms_error == pytest.approx(here.rms_error, rel=0.01), here.name
