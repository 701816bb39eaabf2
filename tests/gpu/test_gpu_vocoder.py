"""The fused vocoder on a GPU, full size: `TRITON_INTERPRET=0 pytest -m gpu tests/gpu`."""

import os

import pytest
import torch
from random_vocoder import FULL, random_vocoder

from cosyq.model.vocoder import StreamState
from cosyq.runtime.fused_vocoder import FusedVocoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs TRITON_INTERPRET=0"),
]


@pytest.fixture(scope="module")
def vocoder():
    return random_vocoder(FULL, device="cuda")


@pytest.fixture(scope="module")
def fused(vocoder):
    return FusedVocoder(vocoder)


@pytest.fixture(scope="module")
def mel():
    return torch.randn(1, FULL.mel_dim, 300, device="cuda", generator=torch.Generator("cuda").manual_seed(3))


def render(vocoder, mel, sizes):
    state, parts = StreamState(), mel.split(sizes, dim=-1)
    with torch.inference_mode():
        return torch.cat(
            [vocoder.render(part, state, final=i == len(parts) - 1) for i, part in enumerate(parts)], dim=-1
        )


def test_sixteen_bits_are_fifty_decibels_from_float32(vocoder, fused, mel, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    expected, found = render(vocoder, mel, [300]), render(fused, mel, [300])
    noise = (found - expected).square().mean()
    assert 10 * torch.log10(expected.square().mean() / noise) > 50  # an H100 gives 58


@pytest.mark.parametrize("seed", range(5))
def test_a_stream_equals_offline_to_the_bit(fused, mel, seed):
    generator, sizes = torch.Generator().manual_seed(seed), []
    while sum(sizes) < 300:
        sizes.append(int(torch.randint(1, min(120, 300 - sum(sizes)) + 1, (), generator=generator)))
    assert torch.equal(render(fused, mel, sizes), render(fused, mel, [300]))


def test_five_minutes_in_bounded_memory(fused, mel):
    """The noise of the first minute is kept by now, and drawn again behind it; nothing else depends on the length."""
    state, peaks = StreamState(), []
    for _ in range(50):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        wav = fused.render(mel, state, final=False)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert torch.isfinite(wav).all()
    assert max(peaks) < 4 << 20


def test_what_is_not_a_number_stays_none(fused, mel):
    """The engine refuses samples that are not finite: an overflow must reach it."""
    broken = mel[..., :50].clone()
    broken[0, 40, 20] = 1e30
    assert not torch.isfinite(render(fused, broken, [50])).all()
