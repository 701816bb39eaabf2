import pytest
import torch

from cosyq.errors import DeviceError
from cosyq.model.config import SamplingConfig
from cosyq.runtime.sampling import draws as random_numbers
from cosyq.runtime.sampling import sample

RAS = SamplingConfig(top_p=0.8, top_k=25, win_size=10, tau_r=0.1)


def draws(logits, history=(), forbid_from=None, count=4000, config=RAS):
    uniform = torch.rand(count, 2, generator=torch.Generator().manual_seed(0))
    drawn = [sample(logits, history, config, row, forbid_from=forbid_from) for row in uniform]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / count


def test_nucleus_keeps_the_likeliest_until_top_p():
    # 0.5 and 0.25 reach 0.75, so the third (0.15) still enters; the fourth does not.
    found = draws(torch.tensor([0.5, 0.25, 0.15, 0.1]).log())
    expected = torch.tensor([0.5, 0.25, 0.15, 0.0]) / 0.9
    assert (found - expected).abs().max() < 0.03


def test_top_k_cuts_a_flat_distribution():
    found = draws(torch.zeros(100))
    assert (found > 0).sum() == 25


def test_a_recent_token_is_drawn_again_from_everything_else():
    logits = torch.tensor([0.97, 0.01, 0.01, 0.01]).log()
    assert draws(logits)[0] == 1
    again = draws(logits, history=[0])
    assert again[0] == 0
    assert (again[1:] - 1 / 3).abs().max() < 0.05
    assert draws(logits, history=[0] + [3] * 10)[0] == 1  # ten tokens ago is forgotten


def test_speech_cannot_end_before_it_may():
    logits = torch.tensor([0.0, 0.0, 9.0, 9.0])
    found = draws(logits, forbid_from=2)
    assert found[2:].sum() == 0
    assert draws(logits, history=[0, 1], forbid_from=2)[2:].sum() == 0  # nor by way of the second draw


def test_random_numbers_do_not_depend_on_the_room():
    one, other = (random_numbers(room, torch.Generator().manual_seed(5)) for room in (7, 6000))
    assert torch.equal(one, other[:7])


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(DeviceError, match="not finite"):
        draws(torch.tensor([0.0, float("nan")]), count=1)
