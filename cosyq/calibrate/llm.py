"""The language model's calibration: what its layers are given where it speaks, and scales that restore its choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cosyq.calibrate.moments import Moments, by_gradient
from cosyq.model.llm import LanguageModel, rope_tables
from cosyq.quantize.grid import Grid
from cosyq.sequences import Heard, Progress

Rows = Callable[[list[int]], Tensor]  # text ids -> their embeddings, [n, hidden] float32

ROUNDS = 6  # through all sequences
BATCH = 4
RATE = 1e-3  # of a scale, a step, to begin with


def llm_moments(
    llm: LanguageModel, rows: Rows, heard: Sequence[Heard], paths: Sequence[str], progress: Progress
) -> Moments:
    """Of the layers named, over sequences that the network is shown as they were spoken.

    An input counts as much as an error there would change the probability of the ids that were spoken: by the squared
    gradient of their log-likelihood, on average over the layer's outputs (the diagonal of the Fisher information; so
    weighs GuidedQuant, arXiv 2505.07004, too).
    """
    moments = Moments(paths)
    with by_gradient(llm, moments), sdpa_kernel(SDPBackend.MATH):  # the others' gradients may differ from run to run
        for index, item in enumerate(heard):
            progress("listening to the language model", index, len(heard))
            spoken = torch.tensor(item.spoken.tokens, device=llm.norm.weight.device)
            logits = _logits(llm, _embeddings(llm, rows, item).requires_grad_(), item)
            F.cross_entropy(logits[: len(spoken)], spoken, reduction="sum").backward()
    return moments


class _ScaledLinear(nn.Module):
    """A packed layer whose blocks' absmax can be learnt: x [..., in] -> [..., out]."""

    def __init__(self, grid: Grid, bias: Tensor | None):
        super().__init__()
        self.values, self.absmax, self.bias = grid.values(), grid.absmax(), bias
        self.change = nn.Parameter(torch.zeros_like(self.absmax))

    def scales(self) -> Tensor:
        return self.absmax * (1 + self.change)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.values * self.scales()[..., None]).flatten(1), self.bias)


def tune_scales(
    teacher: LanguageModel,
    student: LanguageModel,
    rows: Rows,
    heard: Sequence[Heard],
    grids: dict[str, Grid],
    progress: Progress,
) -> dict[str, Tensor]:
    """Fit the scales of packed layers so that the whole network draws the next id as in full precision.

    Codes stay; what is learnt is each block's absmax, by Adam on the divergence of the two distributions, over the
    sequences in turns (the second phase of EfficientQAT, arXiv 2407.11062). `student` is changed.

    Returns the absmax by path, [out, blocks] float32.
    """
    layers = {path: _replaced(student, path, grid) for path, grid in grids.items()}
    changes = [layer.change for layer in layers.values()]
    optimizer = torch.optim.Adam(changes, lr=RATE, betas=(0.9, 0.95))
    steps = max(ROUNDS * len(heard) // BATCH, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 10, 1) * (1 - step / steps))
    order = torch.Generator().manual_seed(0)
    turns: list[int] = []
    with sdpa_kernel(SDPBackend.MATH):
        for step in range(steps):
            progress("tuning scales", step, steps)
            for _ in range(BATCH):
                turns = turns or torch.randperm(len(heard), generator=order).tolist()
                item = heard[turns.pop()]
                embeddings = _embeddings(teacher, rows, item)
                with torch.no_grad():
                    wanted = _logits(teacher, embeddings, item).log_softmax(-1)
                found = _logits(student, embeddings, item).log_softmax(-1)
                loss = F.kl_div(found, wanted, log_target=True, reduction="sum") / (len(wanted) * BATCH)
                loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return {path: layer.scales().detach() for path, layer in layers.items()}


def _replaced(network: nn.Module, path: str, grid: Grid) -> _ScaledLinear:
    parent, _, leaf = path.rpartition(".")
    layer = _ScaledLinear(grid, network.get_submodule(path).bias)  # type: ignore[arg-type]
    setattr(network.get_submodule(parent), leaf, layer)
    return layer


def _embeddings(llm: LanguageModel, rows: Rows, item: Heard) -> Tensor:
    """All that the network is shown of an utterance, what it said included: [positions, hidden] float32."""
    device = llm.norm.weight.device
    shown = []
    for text, speech in (*item.part.shown, ((), item.spoken.tokens)):
        shown.append(rows(list(text)).to(device))
        shown.append(llm.embed_speech(torch.tensor(speech, dtype=torch.int64, device=device)))
    return torch.cat(shown)


def _logits(llm: LanguageModel, embeddings: Tensor, item: Heard) -> Tensor:
    """The logits of every step, [ids + 1, speech_rows]; gradients flow, unlike through `LanguageModel.forward`, whose
    layers share one buffer of keys."""
    c, count = llm.config, len(embeddings)
    rope = rope_tables(torch.arange(count, device=embeddings.device), c.head_dim, c.rope_theta)
    x = embeddings[None]
    for layer in llm.layers:
        keys, values = (embeddings.new_empty(1, c.num_kv_heads, count, c.head_dim) for _ in range(2))
        x = layer(x, rope, keys, values, 0)
    return llm.logits(llm.norm(x)[0, item.part.positions - 1 :])
