"""The language model's refinement: codes, norms and biases learned by what the whole network gives out.

Packing a layer for its inputs leaves errors that others could make up for. Here the gradient of the divergence of the
next id from full precision's reaches all of them, through the tensors as they are stored: codes by `quantize.learned`,
norms and biases (stored in float32 anyway; "norm tweaking", arXiv 2309.02784) by Adam.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cosyq.calibrate.llm import Rows, next_logits, sequence_embeddings
from cosyq.model.llm import LanguageModel
from cosyq.quantize.learned import LearnedCodes
from cosyq.sequences import Heard, Progress

BATCH = 8  # sequences a step
PACE = 7.5e-3  # of the mean distance between two levels, a step
RATE = 5e-4  # Adam's, of norms and biases
WARM_UP = 10  # steps
APART = 16  # of so many sequences one is not learned from, and judges


def refine(
    teacher: LanguageModel,
    student: LanguageModel,
    rows: Rows,
    heard: Sequence[Heard],
    codes: Mapping[str, LearnedCodes],
    passes: int,
    progress: Progress,
) -> dict[str, Tensor]:
    """Learn `codes`, by their layers' paths, and the vectors of `student`, in so many passes over what was spoken.

    Vectors of zeros stay: a manifest has what a parameter lost as a share of it.

    Returns the others by name, on the host. `student`, which begins as `teacher`, and `codes` are changed.

    Raises:
        ValueError: on sequences that were not learned from, the divergence did not fall.
    """
    judges = heard[::APART]
    learnt = [item for index, item in enumerate(heard) if index % APART]
    weights = {path: nn.Parameter(code.weight()) for path, code in codes.items()}
    for path, weight in weights.items():
        student.get_submodule(path).weight = weight
    vectors: dict[str, nn.Parameter] = {
        name: value for name, value in student.named_parameters() if value.ndim == 1 and value.any()
    }
    for value in vectors.values():
        value.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the others' gradients may differ from run to run
        before = _judged(teacher, student, rows, judges)
        _learn(teacher, student, rows, learnt, codes, weights, list(vectors.values()), passes, progress)
        after = _judged(teacher, student, rows, judges)
    if not after < before:
        raise ValueError(f"the divergence was {before:.3g}, and then {after:.3g}")
    return {name: value.detach().cpu() for name, value in vectors.items()}


def _learn(
    teacher: LanguageModel,
    student: LanguageModel,
    rows: Rows,
    heard: Sequence[Heard],
    codes: Mapping[str, LearnedCodes],
    weights: Mapping[str, nn.Parameter],
    vectors: list[nn.Parameter],
    passes: int,
    progress: Progress,
) -> None:
    order = torch.Generator().manual_seed(0)
    turns = [index for _ in range(passes) for index in torch.randperm(len(heard), generator=order).tolist()]
    batches = [turns[start : start + BATCH] for start in range(0, len(turns), BATCH)]
    optimizer = torch.optim.Adam(vectors, betas=(0.9, 0.95))
    for number, batch in enumerate(batches):
        progress("refining the language model", number, len(batches))
        for index in batch:
            (_divergence(teacher, student, rows, heard[index]).mean() / len(batch)).backward()
        share = min((number + 1) / WARM_UP, 1) * (1 - number / len(batches))
        optimizer.param_groups[0]["lr"] = RATE * share
        optimizer.step()
        for path, weight in weights.items():
            assert weight.grad is not None
            codes[path].step(weight.grad, PACE * share)
            weight.data = codes[path].weight()
        student.zero_grad()


def _divergence(teacher: LanguageModel, student: LanguageModel, rows: Rows, item: Heard) -> Tensor:
    """Of the next id, at every step: [ids + 1] nats."""
    embeddings = sequence_embeddings(teacher, rows, item)
    with torch.no_grad():
        wanted = next_logits(teacher, embeddings, item).log_softmax(-1)
    found = next_logits(student, embeddings, item).log_softmax(-1)
    return F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1)


@torch.no_grad()
def _judged(teacher: LanguageModel, student: LanguageModel, rows: Rows, heard: Sequence[Heard]) -> float:
    return torch.cat([_divergence(teacher, student, rows, item) for item in heard]).mean().item()
