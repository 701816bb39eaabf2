import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosyq.runtime.speed import Pace


@settings(max_examples=60, deadline=None)
@given(speed=st.sampled_from([0.5, 0.77, 1.0, 1.3, 2.0]), data=st.data())
def test_chunks_join_to_the_whole(speed, data):
    mel = torch.randn(3, 40)
    sizes = []
    while sum(sizes) < 40:
        sizes.append(data.draw(st.integers(1, 40 - sum(sizes))))
    pace = Pace(speed)
    joined = torch.cat([pace.frames(part) for part in mel.split(sizes, dim=-1)], dim=-1)
    assert torch.allclose(joined, Pace(speed).frames(mel), atol=1e-5)


@pytest.mark.parametrize("speed", [0.5, 0.8, 1.25, 2.0])
def test_frames_lie_between_their_neighbours(speed):
    ramp = torch.arange(50.0)[None]
    out = Pace(speed).frames(ramp)[0]
    assert out.tolist() == pytest.approx([i * speed for i in range(len(out))], abs=1e-4)
    assert len(out) == int(49 / speed) + 1


def test_normal_speed_changes_nothing():
    mel = torch.randn(3, 5)
    assert Pace(1.0).frames(mel) is mel
