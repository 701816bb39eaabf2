"""The draw in Triton's interpreter: the ids of the plain sampler, for the same uniform numbers."""

import interpreter  # noqa: F401
import pytest
import torch

from cosyq.kernels.draw import KEPT, Draws, draw
from cosyq.model.config import SamplingConfig
from cosyq.runtime.batch_sampling import sample_rows

SAMPLING = SamplingConfig(top_p=0.8, top_k=25, win_size=10, tau_r=0.1)
ROWS, IDS, VOCABULARY = 6, 600, 590


def logits_of(kind: str, generator: torch.Generator) -> torch.Tensor:
    logits = torch.randn(ROWS, IDS, generator=generator)
    if kind == "sharp":
        return logits * 20
    if kind == "neighbours":  # the largest share a group, or one comes behind the other
        return logits + 9 * ((torch.arange(IDS) % 256 < 2) | (torch.arange(IDS) < 12))
    if kind == "equal":
        return logits.sign()
    return logits * 0.1


@pytest.mark.parametrize("kind", ["flat", "sharp", "neighbours", "equal"])
def test_ids_are_the_plain_samplers(kind):
    """Also where an id was drawn lately, and where an utterance may not end yet."""
    generator = torch.Generator().manual_seed(3)
    logits = logits_of(kind, generator)
    uniform = torch.rand(ROWS, 1, 2, generator=generator)
    recent = torch.full((ROWS, SAMPLING.win_size), -1)
    recent[::2] = logits[::2].topk(SAMPLING.win_size).indices
    count, minimum = torch.zeros(ROWS, dtype=torch.int64), torch.arange(ROWS) % 3
    ordered = logits - torch.arange(IDS) * 1e-6 if kind == "equal" else logits  # the least of equal ids comes first
    expected = sample_rows(ordered, recent, uniform[:, 0], SAMPLING, forbidden=count < minimum, forbid_from=VOCABULARY)
    d = Draws(
        logits, uniform, recent, count, minimum, torch.full((ROWS,), 9), torch.zeros(ROWS, dtype=torch.int64),
        torch.zeros(ROWS, dtype=torch.uint8), torch.zeros(ROWS, dtype=torch.int64),
        torch.zeros(ROWS, KEPT, dtype=torch.int64),
    )  # fmt: skip
    x, positions = torch.zeros(ROWS, 4), torch.zeros(ROWS, dtype=torch.int32)
    draw(d, x, positions, torch.zeros(IDS, 4), None, SAMPLING, rows=ROWS, vocabulary=VOCABULARY, pdl=False)
    assert torch.equal(d.drawn, expected)
