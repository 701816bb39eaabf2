"""The language model's loop: prefill, then a token a step, until it says stop or may not go on.

What is shown to it, it is shown in parts: one for a text that is there, several for one that still arrives. It knows
embeddings and ids; not text, voices, engines or audio.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cosyq.model.llm import KVCache, LanguageModel

Finish = Literal["stop", "length"]
Sampler = Callable[[Tensor, Sequence[int], bool], int]  # logits [rows], history, may it stop -> id
Embed = Callable[[Sequence[int], Sequence[int]], Tensor]  # text ids, then speech ids -> [n, hidden], where the model is

LONGEST_SILENCE = 5  # tokens


@dataclass(frozen=True)
class Part:
    """What is shown, and how many speech ids there may be before the next part.

    shown: text ids and then speech ids, in turns.
    minimum, maximum: of speech ids, counted from the first part on. The utterance cannot end before `minimum`.
    """

    shown: tuple[tuple[Sequence[int], Sequence[int]], ...]
    minimum: int
    maximum: int

    @property
    def positions(self) -> int:
        return sum(len(text) + len(speech) for text, speech in self.shown)


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


def follow(llm: LanguageModel, embed: Embed, parts: Iterable[Part], cache: KVCache, sampler: Sampler) -> Iterator[int]:
    """Yield the speech ids of an utterance, asking for its next part only when the next id needs it.

    The return value says how it ended. The cache is empty to begin with. Inference mode is entered for the network
    alone: whoever makes the parts may be at work with torch too.
    """
    history: list[int] = []
    waiting: list[Tensor] = []
    for part in parts:
        waiting += [embed(text, speech) for text, speech in part.shown]
        if part.maximum <= len(history):
            continue
        bounds = {"minimum": part.minimum, "maximum": part.maximum}
        drawn = decode(llm, torch.cat(waiting).unsqueeze(0), cache, sampler, **bounds, history=history)
        while True:
            try:
                token = next(drawn)
            except StopIteration as end:
                if end.value == "stop":
                    return "stop"  # type: ignore[return-value]
                break
            yield token
            history.append(token)
        waiting = [embed([], history[-1:])]
    return "length"  # type: ignore[return-value]


class Silence:
    """Drops what exceeds `longest` in a run of `silent` tokens. The language model keeps its own history."""

    def __init__(self, silent: Collection[int], longest: int = LONGEST_SILENCE):
        self._silent, self._longest, self._run = silent, longest, 0

    def lets_through(self, token: int) -> bool:
        """Whether the next token is kept."""
        self._run = self._run + 1 if token in self._silent else 0
        return self._run <= self._longest
