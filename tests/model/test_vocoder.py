import pytest
import torch
import torch.nn.functional as F
from conftest import relative
from hypothesis import given, settings
from hypothesis import strategies as st

from cosyq.artifact.reader import load_stage, open_artifact
from cosyq.model.vocoder import StreamState, excitation_noise


@pytest.fixture(scope="module")
def vocoder(artifact_of):
    artifact = open_artifact(artifact_of("fp32"))
    return load_stage(artifact, "vocoder", device=torch.device("cpu"), dtype=torch.float32, matmul="dequantize")


def render(vocoder, golden, sizes, final=True):
    state, chunks = StreamState(), []
    with torch.inference_mode():
        for index, mel in enumerate(golden["hift.mel"].split(sizes, dim=-1)):
            last = final and index == len(sizes) - 1
            chunks.append(vocoder.render(mel, state, final=last, noise=golden["hift.source_noise"][0]))
    return chunks


def test_pitch_equals_the_original(vocoder, golden):
    padded = F.pad(golden["hift.mel"], (0, vocoder.f0_predictor.lookahead))
    assert relative(vocoder.f0_predictor.run(padded, StreamState()), golden["hift.f0"]) < 1e-7


def test_source_equals_the_original(vocoder, golden):
    source = vocoder.source.run(golden["hift.f0"], golden["hift.source_noise"][0], StreamState())
    assert relative(source, golden["hift.source"][:, 0]) < 1e-6


def test_waveform_equals_the_original(vocoder, golden):
    (wav,) = render(vocoder, golden, [46])
    assert relative(wav, golden["hift.wav"]) < 1e-5


def test_unfinished_waveform_equals_the_original_and_reaches_further(vocoder, golden):
    (wav,) = render(vocoder, golden, [46], final=False)
    expected = golden["hift.wav_unfinished"]
    assert relative(wav[:, : expected.shape[1]], expected) < 1e-5
    # Four frames are held back for the look-ahead, and a few samples for the overlap; the original holds eight.
    assert wav.shape[1] == (46 - vocoder.lookahead) * 480 - 4


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_streaming_equals_offline_at_every_split(vocoder, golden, data):
    sizes = []
    while sum(sizes) < 46:
        sizes.append(data.draw(st.integers(1, 46 - sum(sizes))))
    wav = torch.cat(render(vocoder, golden, sizes), dim=-1)
    assert relative(wav, golden["hift.wav"]) < 1e-5


def test_frames_are_rendered_once(vocoder, golden):
    """A chunk's cost is its own length: later chunks give exactly their own samples."""
    chunks = render(vocoder, golden, [10, 10, 10, 10, 6])
    assert [chunk.shape[1] for chunk in chunks] == [6 * 480 - 4, 4800, 4800, 4800, 10 * 480 + 4]


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_the_shortest_utterances(vocoder, frames):
    wav = vocoder.render(torch.randn(1, 80, frames), StreamState(), final=True)
    assert wav.shape == (1, 480 * frames)
    assert torch.isfinite(wav).all()


def test_a_finished_state_cannot_be_used_again(vocoder):
    state = StreamState()
    vocoder.render(torch.randn(1, 80, 3), state, final=True)
    with pytest.raises(ValueError, match="finished"):
        vocoder.render(torch.randn(1, 80, 3), state, final=True)


@given(first=st.integers(0, 120), count=st.integers(1, 120))
@settings(max_examples=30, deadline=None)
def test_noise_depends_on_position_alone(first, count):
    whole = excitation_noise(0, 240, 2, 8)
    assert torch.equal(excitation_noise(first, count, 2, 8), whole[8 * first : 8 * (first + count)])


def test_a_stream_keeps_tails_and_not_chunks(vocoder):
    """What is carried between chunks does not depend on their length."""
    held = []
    for frames in (20, 200):
        state = StreamState()
        vocoder.render(torch.randn(1, 80, frames), state, final=False)
        held.append(sum(tail.untyped_storage().nbytes() for tail in state._tails.values()))
    assert held[0] == held[1]
