"""The speech language model: Qwen2's backbone with a speech embedding and a speech head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyq.model.config import LLMConfig
from cosyq.model.llm import rope_tables, rotate


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c: LLMConfig):
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * c.head_dim)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        b, t, _ = x.shape
        c, groups = self.c, self.c.num_heads // self.c.num_kv_heads
        q = rotate(self.q_proj(x).view(b, t, c.num_heads, c.head_dim).transpose(1, 2), *rope)
        k = rotate(self.k_proj(x).view(b, t, c.num_kv_heads, c.head_dim).transpose(1, 2), *rope)
        v = self.v_proj(x).view(b, t, c.num_kv_heads, c.head_dim).transpose(1, 2)
        # Repeated by hand: the fast attention kernels do not take grouped heads everywhere.
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    def __init__(self, c: LLMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: LLMConfig, dropout: float):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)
        self.dropout = dropout

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), rope), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class Backbone(nn.Module):
    def __init__(self, c: LLMConfig, dropout: float):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.text_rows, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, dropout) for _ in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, t, hidden] -> the same after the final norm."""
        positions = torch.arange(x.shape[1], device=x.device)
        rope = rope_tables(positions, self.c.head_dim, self.c.rope_theta)
        for layer in self.layers:
            x = layer(x, rope)
        return self.norm(x)


class SpeechLM(nn.Module):
    """state_dict() has the names of llm.pt, but for `lm_head`, which is tied and never asked for speech."""

    def __init__(self, c: LLMConfig, dropout: float = 0.0):
        super().__init__()
        self.c = c
        self.llm = nn.ModuleDict({"model": nn.ModuleDict({"model": Backbone(c, dropout)})})
        self.llm_decoder = nn.Linear(c.hidden_size, c.speech_rows, bias=False)
        self.speech_embedding = nn.Embedding(c.speech_rows, c.hidden_size)
        self.apply(_initialise)

    @property
    def backbone(self) -> Backbone:
        return self.llm["model"]["model"]  # type: ignore[index, return-value]

    def forward(self, ids: Tensor, is_text: Tensor) -> Tensor:
        """Text and speech ids in one row, told apart by `is_text` [b, t] bool: hidden states [b, t, hidden]."""
        text = self.backbone.embed_tokens(ids.where(is_text, 0))
        speech = self.speech_embedding(ids.where(~is_text, 0))
        return self.backbone(torch.where(is_text[..., None], text, speech))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5 * 0.7)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.3)
