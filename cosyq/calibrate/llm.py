"""The language model's calibration: what its layers are given where it speaks, and how much each input matters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cosyq.calibrate.moments import Moments, by_gradient
from cosyq.model.llm import LanguageModel, rope_tables
from cosyq.sequences import Heard, Progress

Rows = Callable[[list[int]], Tensor]  # text ids -> their embeddings, [n, hidden] float32


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
            logits = next_logits(llm, sequence_embeddings(llm, rows, item).requires_grad_(), item)
            F.cross_entropy(logits[: len(spoken)], spoken, reduction="sum").backward()
    return moments


def sequence_embeddings(llm: LanguageModel, rows: Rows, item: Heard) -> Tensor:
    """All that the network is shown of an utterance, what it said included: [positions, hidden] float32."""
    device = llm.norm.weight.device
    shown = []
    for text, speech in (*item.part.shown, ((), item.spoken.tokens)):
        shown.append(rows(list(text)).to(device))
        shown.append(llm.embed_speech(torch.tensor(speech, dtype=torch.int64, device=device)))
    return torch.cat(shown)


def next_logits(llm: LanguageModel, embeddings: Tensor, item: Heard) -> Tensor:
    """The logits of every step, [ids + 1, speech_rows]; gradients flow, unlike through `LanguageModel.forward`, whose
    layers share one buffer of keys."""
    c, count = llm.config, len(embeddings)
    rope = rope_tables(torch.arange(count, device=embeddings.device), c.head_dim, c.rope_theta)
    x = embeddings[None]
    for layer in llm.layers:
        keys, values = (embeddings.new_empty(1, c.num_kv_heads, count, c.head_dim) for _ in range(2))
        x = layer(x, rope, keys, values, 0)
    return llm.logits(llm.norm(x)[0, item.part.positions - 1 :])
