"""The language model's loop: prefill once, then a token a step, until it says stop or may not go on.

It knows embeddings and ids; not text, voices, engines or audio.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from cosyq.model.llm import KVCache, LanguageModel

Finish = Literal["stop", "length"]
Sampler = Callable[[Tensor, Sequence[int], bool], int]  # logits [rows], history, may it stop -> id

LONGEST_SILENCE = 5  # tokens


@torch.inference_mode()
def prefill(llm: LanguageModel, embeddings: Tensor, cache: KVCache) -> Tensor:
    """Run [1, t, hidden] after what the cache holds; returns the logits of its last position, [rows]."""
    return llm.logits(llm(embeddings, cache)[:, -1])[0]


@torch.inference_mode()
def step(llm: LanguageModel, token: int, cache: KVCache) -> Tensor:
    """Run one speech token; returns the logits of the next, [rows]."""
    ids = torch.tensor([[token]], device=cache.keys.device)
    return llm.logits(llm(llm.embed_speech(ids), cache)[:, -1])[0]


def decode(
    llm: LanguageModel,
    embeddings: Tensor,
    cache: KVCache,
    sampler: Sampler,
    *,
    minimum: int,
    maximum: int,
    history: Sequence[int] = (),
) -> Iterator[int]:
    """Yield speech ids; the generator's return value says how it ended.

    Every id from `speech_vocab` up means stop, and none is let through before `minimum` tokens, those of `history`
    counted.
    """
    history = list(history)
    if len(history) >= maximum:
        return "length"  # type: ignore[return-value]
    logits = prefill(llm, embeddings, cache)
    while len(history) < maximum:
        token = sampler(logits.cpu(), history, len(history) >= minimum)
        if token >= llm.config.speech_vocab:
            return "stop"  # type: ignore[return-value]
        yield token
        history.append(token)
        if len(history) < maximum:
            logits = step(llm, token, cache)
    return "length"  # type: ignore[return-value]


def shorten_silence(tokens: Iterable[int], silent: Collection[int], longest: int = LONGEST_SILENCE) -> Iterator[int]:
    """Drop what exceeds `longest` in a run of `silent` tokens. The language model keeps its own history."""
    run = 0
    for token in tokens:
        run = run + 1 if token in silent else 0
        if run <= longest:
            yield token
