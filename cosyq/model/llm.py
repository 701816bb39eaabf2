"""Qwen2 backbone with a speech head: embedded text and speech in, speech logits out.

Written from the published architecture (Qwen2 technical report, arXiv 2407.10671) and checked against
the original CosyVoice code. It does not know tokenizers, sampling or stop ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyq.model.config import LLMConfig


@dataclass
class KVCache:
    """Keys and values of the positions seen so far, in buffers of fixed capacity.

    keys, values: [layers, batch, kv_heads, capacity, head_dim]; the first `length` positions are filled.
    """

    keys: Tensor
    values: Tensor
    length: int = 0

    @classmethod
    def empty(
        cls, config: LLMConfig, capacity: int, *, batch: int = 1, device: torch.device, dtype: torch.dtype
    ) -> KVCache:
        shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim)
        return cls(torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]


class RMSNorm(nn.Module):
    """x [..., hidden] float32 -> the same, scaled to unit mean square, in `dtype`."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x * self.weight).to(self.dtype)


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [t, head_dim] float32, for integer `positions` [t] (RoFormer, half-split pairs)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = torch.outer(positions.float(), 1.0 / theta**exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [b, heads, t, head_dim] by its position; the arithmetic is float32."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention over a KV cache."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, past: int) -> Tensor:
        """x [b, t, hidden]; keys, values [b, kv_heads, capacity, head_dim], written at past .. past + t."""
        b, t, _ = x.shape
        q = rotate(self.q_proj(x).view(b, t, self.heads, self.head_dim).transpose(1, 2), *rope)
        k = rotate(self.k_proj(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2), *rope)
        v = self.v_proj(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        keys[:, :, past : past + t] = k
        values[:, :, past : past + t] = v
        k, v = keys[:, :, : past + t], values[:, :, : past + t]
        # A single new position sees everything before it; only a longer run needs a mask.
        mask = None
        if t > 1:
            mask = torch.ones(t, past + t, dtype=torch.bool, device=x.device).tril(past)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, self.heads * self.head_dim))

    def step(
        self, x: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, positions: Tensor, mask: Tensor
    ) -> Tensor:
        """x [b, 1, hidden], each at its own position, [b]; mask [b, 1, 1, span], True where a row may look."""
        b, span, rows = len(x), mask.shape[-1], torch.arange(len(x), device=x.device)
        q = rotate(self.q_proj(x).view(b, self.heads, 1, self.head_dim), *rope)
        k = rotate(self.k_proj(x).view(b, self.kv_heads, 1, self.head_dim), *rope)
        keys[rows, :, positions] = k[:, :, 0]
        values[rows, :, positions] = self.v_proj(x).view(b, self.kv_heads, self.head_dim)
        k, v = keys[:, :, :span], values[:, :, :span]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(out.reshape(b, 1, self.heads * self.head_dim))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LLMConfig, dtype: torch.dtype):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, past: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, keys, values, past)
        return x + self.mlp(self.post_attention_layernorm(x))

    def step(
        self, x: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, positions: Tensor, mask: Tensor
    ) -> Tensor:
        x = x + self.self_attn.step(self.input_layernorm(x), rope, keys, values, positions, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """Text and speech embeddings in, logits over `speech_rows` ids out.

    The text embedding is not a part of it: it is only looked up, stays on the host and is
    added by the caller.
    """

    def __init__(self, config: LLMConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.speech_embedding = nn.Embedding(config.speech_rows, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, dtype) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.head = nn.Linear(config.hidden_size, config.speech_rows, bias=False)

    def embed_speech(self, ids: Tensor) -> Tensor:
        """ids [b, t] -> [b, t, hidden] float32."""
        return self.speech_embedding(ids).float()

    def forward(self, embeddings: Tensor, cache: KVCache) -> Tensor:
        """Run `embeddings` [b, t, hidden] after what `cache` holds, and advance it by t.

        Returns the hidden states after the final norm, [b, t, hidden] in the compute dtype.
        """
        past, t = cache.length, embeddings.shape[1]
        if past + t > cache.capacity:
            raise ValueError(f"KV cache holds {cache.capacity} positions, {past + t} are needed")
        positions = torch.arange(past, past + t, device=embeddings.device)
        rope = rope_tables(positions, self.config.head_dim, self.config.rope_theta)
        x = embeddings.float()
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, cache.keys[index], cache.values[index], past)
        cache.length = past + t
        return self.norm(x)

    def step(self, ids: Tensor, positions: Tensor, cache: KVCache, span: int) -> Tensor:
        """Run one speech id of each of the batch's first b rows, ids [b], at its own position, [b]: [b, speech_rows].

        A row's position is overwritten, and it sees what is up to it; all are below `span`. `cache.length` stays.
        """
        c, rows = self.config, len(ids)
        mask = (torch.arange(span, device=ids.device) <= positions[:, None])[:, None, None]
        cos, sin = (t[:, None, None] for t in rope_tables(positions, c.head_dim, c.rope_theta))
        x = self.embed_speech(ids[:, None])
        for index, layer in enumerate(self.layers):
            x = layer.step(x, (cos, sin), cache.keys[index, :rows], cache.values[index, :rows], positions, mask)
        return self.logits(self.norm(x)[:, 0])

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden] -> [..., speech_rows] float32."""
        return self.head(hidden).float()
