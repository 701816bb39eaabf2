"""The fused vocoder against the reference, in Triton's interpreter: a small network, and the original's own waveform."""

import dataclasses

import interpreter  # noqa: F401
import pytest
import torch
from conftest import relative
from random_vocoder import SMALL, random_vocoder

from cosyq.artifact.reader import load_stage, open_artifact
from cosyq.errors import DeviceError
from cosyq.model.vocoder import StreamState, excitation_noise
from cosyq.runtime import fused_vocoder
from cosyq.runtime.fused_vocoder import FusedVocoder, MergedNoise
from cosyq.runtime.vocoder_weights import pack

SINES = 3e-5  # the output's are exact to 2e-7, and add up to something small
MEL = torch.randn(1, SMALL.mel_dim, 20, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def reference():
    return random_vocoder(SMALL)


@pytest.fixture(scope="module")
def fused(reference):
    """In float32, so that only the order of sums and the last bit of a sine differ."""
    return FusedVocoder(reference, torch.float32, chunk=5)


def render(vocoder, sizes, final=True, **options):
    state, chunks = StreamState(), []
    with torch.inference_mode():
        for index, mel in enumerate(MEL[..., : sum(sizes)].split(sizes, dim=-1)):
            chunks.append(vocoder.render(mel, state, final=final and index == len(sizes) - 1, **options))
    return chunks


@pytest.mark.parametrize("sizes", [[1], [11], [1, 0, 6, 2, 3]], ids=str)
def test_an_utterance_equals_the_references(reference, fused, sizes):
    """At once in chunks of the kernels' own, and as a stream: the same number of samples from every call."""
    expected, found = render(reference, sizes), render(fused, sizes)
    assert [chunk.shape for chunk in found] == [chunk.shape for chunk in expected]
    assert relative(torch.cat(found, -1), torch.cat(expected, -1)) < SINES


def test_utterances_by_turns(reference, fused):
    """Two streams through the same buffers, with noise of their own."""
    noise = torch.rand(2, 7 * SMALL.samples_per_frame, SMALL.harmonics + 1, generator=torch.Generator().manual_seed(2))
    expected = [torch.cat(render(reference, [7], noise=n), -1) for n in noise]
    states, found = (StreamState(), StreamState()), ([], [])
    for begin, end in ((0, 6), (6, 7)):
        for state, chunks, own in zip(states, found, noise, strict=True):
            chunks.append(fused.render(MEL[..., begin:end], state, final=end == 7, noise=own))
    for chunks, whole in zip(found, expected, strict=True):
        assert relative(torch.cat(chunks, -1), whole) < SINES
    assert relative(*expected) > 1e-3


def test_what_a_stream_carries_does_not_grow(fused):
    held = []
    for frames in (5, 9):
        state = StreamState()
        fused.render(MEL[..., :frames], state, final=False)
        held.append(sum(tail.untyped_storage().nbytes() for tail in state._tails.values()))
    assert held[0] == held[1]


def test_a_finished_state_cannot_be_used_again(fused):
    state = StreamState()
    assert fused.render(MEL[..., :0], state, final=True).shape == (1, 0)
    with pytest.raises(ValueError, match="finished"):
        fused.render(MEL[..., :3], state, final=True)


def test_sixteen_bits(reference):
    """Ten convolutions deep, each rounded to 11 bits of mantissa."""
    (expected,), (found,) = render(reference, [3]), render(FusedVocoder(reference, chunk=3), [3])
    assert 1e-5 < relative(found, expected) < 5e-3


def test_waveform_equals_the_originals(artifact_of, golden):
    """The published network: what the original code computed for the first frames."""
    artifact = open_artifact(artifact_of("fp32"))
    vocoder = load_stage(artifact, "vocoder", device=torch.device("cpu"), dtype=torch.float32, matmul="dequantize")
    fused = FusedVocoder(vocoder, torch.float32, chunk=2)
    mel, noise = golden["hift.mel"][..., :6], golden["hift.source_noise"][0]
    wav = fused.render(mel, StreamState(), final=False, noise=noise)
    assert wav.shape[1] == 2 * 480 - 4
    assert relative(wav, golden["hift.wav"][:, : wav.shape[1]]) < 1e-5


def test_noise_is_the_same_kept_or_drawn(reference, monkeypatch):
    """By position: at any frame and in any order, from blocks that are kept and from behind them."""
    size = SMALL.samples_per_frame
    whole = excitation_noise(0, 300, SMALL.harmonics + 1, size) @ reference.source.linear.weight[0]
    monkeypatch.setattr(fused_vocoder, "KEPT_NOISE", 3)
    noise = MergedNoise(reference, 101)
    for first, count in ((0, 3), (49, 100), (140, 10), (140, 11), (150, 20), (0, 101), (199, 100)):
        at, before = noise.place(first, count, None), min(first, 1)
        found = noise.merged[at - before * size : at + count * size]
        assert torch.equal(found, whole[(first - before) * size : (first + count) * size]), (first, count)


@pytest.mark.parametrize(
    "change",
    [{"resblock_dilations": ((1, 3), (1, 2))}, {"n_fft": 32, "hop": 8}, {"resblock_kernels": (3, 29)}],
    ids=str,
)
def test_dimensions_that_no_kernel_knows(change):
    with pytest.raises(DeviceError, match="its kernels know; use --engine reference"):
        pack(random_vocoder(dataclasses.replace(SMALL, **change)), torch.float16)


def test_weights_that_do_not_fit(reference):
    vocoder = random_vocoder(SMALL)
    vocoder.resblocks[1].convs2[0].weight.data[0, 0, 0] = 1e5
    with pytest.raises(DeviceError, match="16 bits"):
        pack(vocoder, torch.float16)
