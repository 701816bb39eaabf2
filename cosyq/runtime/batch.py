"""Many utterances in flight over one language model: rows of a fixed batch that are joined and left between steps.

A step has fixed shapes and never waits for the host, so it can be one CUDA graph; the host looks at the results when it
likes, and what a row drew beyond its end is never shown. It knows embeddings and ids; not text, voices or audio.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cosyq.errors import DeviceError
from cosyq.model.config import SamplingConfig
from cosyq.model.llm import KVCache, LanguageModel, rope_tables, rotate
from cosyq.runtime.batch_sampling import sample_rows
from cosyq.runtime.decode import Finish, prefill

SPAN = 256  # attention runs over a multiple of so many positions


@dataclass(frozen=True)
class News:
    """What a row drew since it was last asked, and how it ended, if it did."""

    tokens: list[int]
    finish: Finish | None


class BatchDecoder:
    """`rows` utterances at most, each of at most `capacity` positions and `longest` speech ids."""

    def __init__(self, llm: LanguageModel, sampling: SamplingConfig, *, rows: int, capacity: int, longest: int):
        c, device = llm.config, llm.norm.weight.device
        self.llm, self.sampling, self.longest = llm, sampling, longest
        self.cache = KVCache.empty(c, capacity, batch=rows, device=device, dtype=llm.norm.dtype)
        self.cache.keys.zero_()  # what a mask hides must still be finite
        self.cache.values.zero_()

        def counts(value: int = 0) -> Tensor:
            return torch.full((rows,), value, dtype=torch.int64, device=device)

        self.rows = torch.arange(rows, device=device)
        self.positions, self.drawn_count = counts(), counts()
        self.minimum, self.maximum = counts(), counts()
        self.finished = torch.ones(rows, dtype=torch.bool, device=device)
        self.logits = torch.zeros(rows, c.speech_rows, device=device)
        self.recent = torch.full((rows, sampling.win_size), -1, device=device)
        self.uniform = torch.zeros(rows, longest, 2, device=device)
        self.drawn = torch.full((rows, longest), -1, device=device)
        self.shown = [0] * rows  # ids of each row that the host has seen
        self.free = set(range(rows))
        self.reach = [0] * rows  # positions that each row may come to have

    @torch.inference_mode()
    def join(self, embeddings: Tensor, *, minimum: int, maximum: int, generator: torch.Generator) -> int:
        """Begin an utterance with its prompt, embeddings [1, t, hidden]; returns its row.

        Raises:
            ValueError: there is no free row, or it may grow beyond what a row holds.
        """
        reach = embeddings.shape[1] + maximum
        if not self.free:
            raise ValueError("every row is taken")
        if reach > self.cache.capacity or not 0 < maximum <= self.longest:
            raise ValueError(f"{reach} positions and {maximum} ids do not fit a row")
        row = min(self.free)
        own = KVCache(self.cache.keys[:, row : row + 1], self.cache.values[:, row : row + 1])
        self.logits[row] = prefill(self.llm, embeddings, own)
        self.positions[row] = own.length
        self.minimum[row], self.maximum[row] = minimum, maximum
        self.drawn_count[row], self.recent[row], self.finished[row] = 0, -1, False
        self.uniform[row, :maximum] = torch.rand(maximum, 2, generator=generator).to(self.uniform.device)
        self.shown[row], self.reach[row] = 0, reach
        self.free.remove(row)
        return row

    def leave(self, row: int) -> None:
        """The row is free for another utterance, whether this one has ended or not."""
        self.finished[row] = True
        self.reach[row] = 0
        self.free.add(row)

    @torch.inference_mode()
    def step(self) -> None:
        """Draw one id in every row that goes on, and compute what follows it."""
        vocabulary, live = self.llm.config.speech_vocab, ~self.finished
        at = self.drawn_count.clamp(max=self.longest - 1)
        ids = sample_rows(
            self.logits,
            self.recent,
            self.uniform[self.rows, at],
            self.sampling,
            forbidden=self.drawn_count < self.minimum,
            forbid_from=vocabulary,
        )
        self.drawn[self.rows, at] = torch.where(live, ids, self.drawn[self.rows, at])
        turn = at % self.sampling.win_size
        self.recent[self.rows, turn] = torch.where(live, ids, self.recent[self.rows, turn])
        self.drawn_count += live
        ended = (ids < 0) | (ids >= vocabulary) | (self.drawn_count >= self.maximum)
        self.finished |= ended
        self.logits.copy_(self._forward(ids.clamp(0, vocabulary - 1)))
        self.positions += live & ~ended

    def news(self, row: int) -> News:
        """What the row drew since the last call. Waits for the device.

        Raises:
            DeviceError: its logits are not finite.
        """
        count, finished = int(self.drawn_count[row]), bool(self.finished[row])
        tokens = self.drawn[row, self.shown[row] : count].tolist()
        self.shown[row] = count
        if tokens and tokens[-1] < 0:
            raise DeviceError("the language model's logits are not finite", remedy="use bf16 or fp32 arithmetic")
        if tokens and tokens[-1] >= self.llm.config.speech_vocab:
            return News(tokens[:-1], "stop")
        return News(tokens, "length" if finished else None)

    def _forward(self, ids: Tensor) -> Tensor:
        """The logits after ids [b], each at its row's position: [b, speech_rows]."""
        llm, cache, c = self.llm, self.cache, self.llm.config
        span = min(-(-max(self.reach, default=1) // SPAN) * SPAN, cache.capacity)
        mask = (torch.arange(span, device=ids.device) <= self.positions[:, None])[:, None, None]
        rope = tuple(t[:, None, None] for t in rope_tables(self.positions, c.head_dim, c.rope_theta))
        x = llm.embed_speech(ids[:, None])
        for index, layer in enumerate(llm.layers):
            attention, keys, values = layer.self_attn, cache.keys[index], cache.values[index]
            h = layer.input_layernorm(x)
            q = rotate(attention.q_proj(h).view(len(ids), c.num_heads, 1, c.head_dim), *rope)
            k = rotate(attention.k_proj(h).view(len(ids), c.num_kv_heads, 1, c.head_dim), *rope)
            keys[self.rows, :, self.positions] = k[:, :, 0]
            values[self.rows, :, self.positions] = attention.v_proj(h).view(len(ids), c.num_kv_heads, c.head_dim)
            out = F.scaled_dot_product_attention(
                q, keys[:, :, :span], values[:, :, :span], attn_mask=mask, enable_gqa=True
            )
            x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return llm.logits(llm.norm(x)[:, 0])
