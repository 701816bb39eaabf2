"""The batched sampler draws from the distribution that the paper describes, row by row."""

import pytest
import torch

from cosyq.model.config import SamplingConfig
from cosyq.runtime.batch_sampling import sample_rows

CONFIG = SamplingConfig(top_p=0.8, top_k=25, win_size=10, tau_r=0.1)
ROWS, STOP = 40, 36
DRAWS = 4000


def logits(seed: int) -> torch.Tensor:
    return 2 * torch.randn(ROWS, generator=torch.Generator().manual_seed(seed))


def batch(rows: torch.Tensor, uniform: torch.Tensor, *, history: list[int], may_stop: bool, config=CONFIG):
    recent = torch.full((len(rows), config.win_size), -1)
    recent[:, : len(history)] = torch.tensor(history[-config.win_size :], dtype=torch.int64)
    return sample_rows(
        rows, recent, uniform, config, forbidden=torch.full((len(rows),), not may_stop), forbid_from=STOP
    )


def plain(logits, history, may_stop, generator):
    """One id, written anew from the paper's words and by torch's own draws."""
    p = logits.clone()
    p[STOP:] = p[STOP:] if may_stop else -torch.inf
    p = p.softmax(0)
    nucleus, total = [], 0.0
    for index in p.argsort(descending=True).tolist():
        if total >= CONFIG.top_p or len(nucleus) == CONFIG.top_k:
            break
        nucleus.append(index)
        total += float(p[index])
    drawn = nucleus[int(torch.multinomial(p[nucleus], 1, generator=generator))]
    if history[-CONFIG.win_size :].count(drawn) >= CONFIG.win_size * CONFIG.tau_r:
        p[drawn] = 0
        drawn = int(torch.multinomial(p, 1, generator=generator))
    return drawn


@pytest.mark.parametrize("may_stop", [True, False])
@pytest.mark.parametrize("history", [[], [3, 5, 7], "likeliest"])
def test_the_distribution_is_the_papers(history, may_stop):
    """Chi-square over 4,000 draws of each; the second draw is over all ids but one, the first over the nucleus."""
    row = logits(1)
    history = row[:STOP].topk(3).indices.tolist() if history == "likeliest" else history
    generator = torch.Generator().manual_seed(2)
    one_by_one = [plain(row, history, may_stop, generator) for _ in range(DRAWS)]
    uniform = torch.rand(DRAWS, 2, generator=generator)
    rows = batch(row.expand(DRAWS, -1), uniform, history=history, may_stop=may_stop)
    a, b = (torch.bincount(torch.as_tensor(ids), minlength=ROWS).double() for ids in (one_by_one, rows))
    rare = a + b < 10  # one bin for all of them
    a, b = (torch.cat([counts[~rare], counts[rare].sum(0, keepdim=True)]) for counts in (a, b))
    statistic = ((a - b).square() / (a + b).clamp(min=1)).sum()
    freedom = len(a) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    if not may_stop:
        assert rows.max() < STOP


def test_a_row_does_not_depend_on_its_neighbours():
    rows = torch.stack([logits(seed) for seed in range(6)])
    uniform = torch.rand(6, 2, generator=torch.Generator().manual_seed(3))
    together = batch(rows, uniform, history=[1], may_stop=True)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    assert torch.equal(together[order], batch(rows[order], uniform[order], history=[1], may_stop=True))
    for index in range(6):
        alone = batch(rows[index : index + 1], uniform[index : index + 1], history=[1], may_stop=True)
        assert alone[0] == together[index]


def test_every_uniform_number_draws_something_possible():
    row = logits(4)
    row = row.roll(-int(row.argmax()))  # the first id is the likeliest, and ruled out when it repeats
    edges = torch.tensor([0.0, 1e-38, 0.5, 1 - 2**-24, 1.0])
    uniform = edges[:, None].expand(-1, 2)
    for history in ([], row.topk(1).indices.tolist()):
        ids = batch(row.expand(5, -1), uniform, history=history, may_stop=False)
        assert ids.min() >= 0
        assert ids.max() < STOP
        assert not set(history) & set(ids.tolist())
    certain = torch.full((1, ROWS), -200.0)
    certain[0, 7] = 0.0
    assert all(batch(certain, e.expand(1, 2), history=[], may_stop=True) == 7 for e in edges)


def test_logits_that_are_not_finite_are_told():
    rows = torch.stack([logits(1), logits(2)])
    rows[1, 3] = torch.nan
    ids = batch(rows, torch.rand(2, 2), history=[], may_stop=True)
    assert ids[0] >= 0
    assert ids[1] == -1
