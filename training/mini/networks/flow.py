"""The flow with its AdaLN projections trainable, and the conditional flow matching loss."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyq.model.config import FlowConfig
from cosyq.model.dit import block_causal_mask, modulated_norm, rope_tables, rotate_first

Rope = tuple[Tensor, Tensor]
UNCONDITIONAL = 0.2  # share of rows, for classifier-free guidance
LARGEST_MODULATION = 3.0
LARGEST_HEAD = 3.0  # root mean square of a head's query or key: scores stay below 72


def exact(x: Tensor) -> AbstractContextManager[None]:
    """float32 even under autocast, where it costs little: timestep, modulation, the velocity itself."""
    return torch.autocast(x.device.type, enabled=False)


class Lookahead(nn.Module):
    """Two convolutions over embedded tokens: three tokens ahead, then two back; residual."""

    def __init__(self, c: FlowConfig):
        super().__init__()
        self.ahead = c.lookahead
        self.conv1 = nn.Conv1d(c.token_dim, c.lookahead_channels, c.lookahead + 1)
        self.conv2 = nn.Conv1d(c.lookahead_channels, c.token_dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, n, token_dim] -> the same."""
        h = F.leaky_relu(self.conv1(F.pad(x.transpose(1, 2), (0, self.ahead))))
        return x + self.conv2(F.pad(h, (2, 0))).transpose(1, 2)


class TimeEmbedding(nn.Module):
    def __init__(self, width: int, dim: int):
        super().__init__()
        self.width = width
        self.time_mlp = nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """t [b] in 0..1 -> [b, dim]."""
        half = self.width // 2
        frequencies = torch.exp(torch.arange(half, device=t.device).float() * -(math.log(10000) / (half - 1)))
        angles = 1000 * t[:, None] * frequencies
        with exact(t):
            return self.time_mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))


class Modulation(nn.Module):
    """The timestep's shifts, scales and gates; zero at first, so that every block begins as the identity.

    `excess` is how far the last ones went beyond LARGEST_MODULATION, on average.
    """

    excess: Tensor

    def __init__(self, dim: int, vectors: int):
        super().__init__()
        self.vectors = vectors
        self.linear = nn.Linear(dim, vectors * dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> tuple[Tensor, ...]:
        """t [b, dim] -> `vectors` tensors [b, 1, dim] float32."""
        with exact(t):
            made = self.linear(F.silu(t.float()))
        self.excess = F.relu(made.abs() - LARGEST_MODULATION).mean()
        return made[:, None].chunk(self.vectors, dim=-1)


class Attention(nn.Module):
    """`excess` is how far the last queries and keys went beyond LARGEST_HEAD, on average."""

    excess: Tensor

    def __init__(self, c: FlowConfig):
        super().__init__()
        self.c = c
        inner = c.heads * c.head_dim
        self.to_q = nn.Linear(c.dim, inner)
        self.to_k = nn.Linear(c.dim, inner)
        self.to_v = nn.Linear(c.dim, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, c.dim)])

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
        split = (*x.shape[:2], self.c.heads, self.c.head_dim)
        q = rotate_first(self.to_q(x), *rope).view(split).transpose(1, 2)
        k = rotate_first(self.to_k(x), *rope).view(split).transpose(1, 2)
        v = self.to_v(x).view(split).transpose(1, 2)
        self.excess = sum(F.relu(h.float().square().mean(-1).add(1e-6).sqrt() - LARGEST_HEAD).mean() for h in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, c: FlowConfig):
        super().__init__()
        up = nn.Sequential(nn.Linear(c.dim, c.ff_dim), nn.GELU(approximate="tanh"))
        self.ff = nn.Sequential(up, nn.Identity(), nn.Linear(c.ff_dim, c.dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x)


class Block(nn.Module):
    def __init__(self, c: FlowConfig):
        super().__init__()
        self.attn_norm = Modulation(c.dim, 6)
        self.attn = Attention(c)
        self.ff = FeedForward(c)

    def forward(self, x: Tensor, t: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.attn_norm(t)
        x = x + gate_a * self.attn(modulated_norm(x, shift_a, scale_a), rope, mask)
        return x + gate_f * self.ff(modulated_norm(x, shift_f, scale_f))


class PositionalConv(nn.Module):
    def __init__(self, c: FlowConfig):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv1d(c.dim, c.dim, c.conv_kernel, groups=c.conv_groups), nn.Mish())
        self.conv2 = nn.Sequential(nn.Conv1d(c.dim, c.dim, c.conv_kernel, groups=c.conv_groups), nn.Mish())
        self.past = c.conv_kernel - 1

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        for conv in (self.conv1, self.conv2):
            x = conv(F.pad(x, (self.past, 0)))
        return x.transpose(1, 2)


class InputEmbedding(nn.Module):
    def __init__(self, c: FlowConfig):
        super().__init__()
        self.proj = nn.Linear(3 * c.mel_dim + c.token_dim, c.dim)
        self.conv_pos_embed = PositionalConv(c)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).float()
        return self.conv_pos_embed(x).float() + x


class Rotary(nn.Module):
    def __init__(self, head_dim: int):
        super().__init__()
        exponents = torch.arange(0, head_dim, 2).float() / head_dim
        self.register_buffer("inv_freq", 10000.0**-exponents)


class DiT(nn.Module):
    def __init__(self, c: FlowConfig, time_width: int):
        super().__init__()
        self.time_embed = TimeEmbedding(time_width, c.dim)
        self.input_embed = InputEmbedding(c)
        self.rotary_embed = Rotary(c.head_dim)
        self.transformer_blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm_out = Modulation(c.dim, 2)
        self.proj_out = nn.Linear(c.dim, c.mel_dim)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor, condition: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
        """Velocity [b, t, mel] of x [b, t, mel] at times t [b], given condition [b, t, mel + token + mel]."""
        rope = rope_tables(x.shape[1], self.rotary_embed.inv_freq)
        t = self.time_embed(t)
        h = self.input_embed(torch.cat([x, condition], dim=-1))
        for block in self.transformer_blocks:
            h = block(h, t, rope, mask)
        scale, shift = self.norm_out(t)
        with exact(h):
            return self.proj_out(modulated_norm(h, shift, scale))


class FlowMatching(nn.Module):
    """state_dict() has the names of flow.pt."""

    def __init__(self, c: FlowConfig, time_width: int):
        super().__init__()
        self.c = c
        self.input_embedding = nn.Embedding(c.vocab, c.token_dim)
        self.spk_embed_affine_layer = nn.Linear(c.speaker_dim, c.mel_dim)
        self.pre_lookahead_layer = Lookahead(c)
        self.decoder = nn.ModuleDict({"estimator": DiT(c, time_width)})

    def condition(self, tokens: Tensor, speaker: Tensor, prompt: Tensor) -> Tensor:
        """tokens [b, n], speaker [b, 192], prompt mel [b, 2n, mel] (zero after it) -> [b, 2n, mel + token + mel]."""
        mu = self.pre_lookahead_layer(self.input_embedding(tokens)).float()
        mu = mu.repeat_interleave(self.c.token_mel_ratio, dim=1)
        voice = self.spk_embed_affine_layer(F.normalize(speaker, dim=-1)).float()
        return torch.cat([prompt, mu, voice[:, None].expand(-1, mu.shape[1], -1)], dim=-1)

    def velocity(self, x: Tensor, condition: Tensor, t: Tensor, *, streaming: bool) -> Tensor:
        mask = block_causal_mask(x.shape[1], self.c.chunk_frames, x.device) if streaming else None
        return self.decoder["estimator"](x, condition, t, mask)

    def excess(self) -> Tensor:
        """What the last evaluation's modulations, queries and keys exceed their bounds by, summed over the blocks.

        Nothing in the published architecture normalizes queries and keys or bounds AdaLN, and their product can
        run away: after some 3,500 steps at 1.2e-3 the first block scaled by 336 and its scores reached 1e8. So the
        bounds are a loss, and the network stays the published one.
        """
        return torch.stack([m.excess for m in self.modules() if isinstance(m, Modulation | Attention)]).sum()

    def loss(self, tokens: Tensor, speaker: Tensor, mel: Tensor, prompt: Tensor, *, streaming: bool) -> Tensor:
        """Mean squared error of the velocity; a fifth of the rows are trained without any condition."""
        b = mel.shape[0]
        kept = (torch.rand(b, 1, 1, device=mel.device) >= UNCONDITIONAL).float()
        condition = self.condition(tokens, speaker, prompt) * kept
        noise = torch.randn_like(mel)
        t = torch.rand(b, device=mel.device)
        at = t[:, None, None]
        predicted = self.velocity((1 - at) * noise + at * mel, condition, t, streaming=streaming)
        return F.mse_loss(predicted, mel - noise)
