"""The flow's estimator: a diffusion transformer (DiT, arXiv 2212.09748) over mel frames.

AdaLN depends on the timestep alone and the timesteps are fixed, so its projections are not here:
each Euler step brings one row of a table that was computed at build time (see `checkpoint.fold`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyq.model.config import FlowConfig

NORM_EPS = 1e-6


def rope_tables(frames: int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [frames, 2 * len(frequencies)] float32, for interleaved pairs."""
    positions = torch.arange(frames, device=frequencies.device, dtype=torch.float32)
    angles = torch.outer(positions, frequencies.float()).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def rotate_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first `cos.shape[-1]` channels of x [b, t, inner] and leave the rest.

    The original rotates before it splits the heads, so only head 0 ever learns of positions;
    the trained weights rely on that.
    """
    width = cos.shape[-1]
    head = x[..., :width].float()
    even, odd = head[..., 0::2], head[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return torch.cat([(head * cos + turned * sin).to(x.dtype), x[..., width:]], dim=-1)


def block_causal_mask(frames: int, block: int, device: torch.device) -> Tensor:
    """[frames, frames] bool: a frame sees its own block of `block` frames and all blocks before."""
    index = torch.arange(frames, device=device) // block
    return index[:, None] >= index[None, :]


class PositionalConv(nn.Module):
    """Two causal grouped convolutions with Mish, the DiT's position embedding."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.conv1 = nn.Conv1d(config.dim, config.dim, config.conv_kernel, groups=config.conv_groups)
        self.conv2 = nn.Conv1d(config.dim, config.dim, config.conv_kernel, groups=config.conv_groups)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, t, dim] -> [b, t, dim], in the weights' dtype."""
        x = x.to(self.conv1.weight.dtype).transpose(1, 2)
        for conv in (self.conv1, self.conv2):
            x = F.mish(conv(F.pad(x, (conv.kernel_size[0] - 1, 0))))
        return x.transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, config: FlowConfig):
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        inner = config.heads * config.head_dim
        self.to_q = nn.Linear(config.dim, inner)
        self.to_k = nn.Linear(config.dim, inner)
        self.to_v = nn.Linear(config.dim, inner)
        self.to_out = nn.Linear(inner, config.dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        b, t, _ = x.shape
        split = (b, t, self.heads, self.head_dim)
        q = rotate_first(self.to_q(x), *rope).view(split).transpose(1, 2)
        k = rotate_first(self.to_k(x), *rope).view(split).transpose(1, 2)
        v = self.to_v(x).view(split).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).reshape(b, t, -1))


class FeedForward(nn.Module):
    def __init__(self, config: FlowConfig):
        super().__init__()
        self.up = nn.Linear(config.dim, config.ff_dim)
        self.down = nn.Linear(config.ff_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: FlowConfig, dtype: torch.dtype):
        super().__init__()
        self.dim, self.dtype = config.dim, dtype
        self.attn = Attention(config)
        self.ff = FeedForward(config)

    def forward(self, x: Tensor, modulation: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """x [b, t, dim] float32; modulation [6, dim] float32: shift, scale, gate of attention, then of the MLP."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation
        h = modulated_norm(x, shift_a, scale_a).to(self.dtype)
        x = x + gate_a * self.attn(h, rope, mask)
        h = modulated_norm(x, shift_f, scale_f).to(self.dtype)
        return x + gate_f * self.ff(h)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then the timestep's scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


class DiT(nn.Module):
    """Predicts the velocity of noisy mel frames."""

    def __init__(self, config: FlowConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.input_proj = nn.Linear(2 * config.mel_dim + config.token_dim + config.mel_dim, config.dim)
        self.conv_pos = PositionalConv(config)
        self.rope_frequencies = nn.Parameter(torch.empty(config.head_dim // 2))
        self.blocks = nn.ModuleList(Block(config, dtype) for _ in range(config.depth))
        self.proj_out = nn.Linear(config.dim, config.mel_dim)

    def forward(self, x: Tensor, condition: Tensor, modulation: Tensor, mask: Tensor | None) -> Tensor:
        """One evaluation.

        Args:
            x: noisy mel, [b, t, mel] float32.
            condition: prompt mel, encoded tokens and speaker, concatenated, [b, t, mel + token + mel] float32.
            modulation: the timestep's table row, [modulation_width] float32.
            mask: [t, t] bool, True where attention is allowed; None for everywhere.

        Returns the velocity, [b, t, mel] float32.
        """
        depth, dim = self.config.depth, self.config.dim
        per_block = modulation[: 6 * depth * dim].view(depth, 6, dim)
        scale, shift = modulation[6 * depth * dim :].view(2, dim)
        rope = rope_tables(x.shape[1], self.rope_frequencies)
        h = self.input_proj(torch.cat([x, condition], dim=-1).to(self.dtype)).float()
        h = self.conv_pos(h).float() + h
        for block, row in zip(self.blocks, per_block, strict=True):
            h = block(h, row, rope, mask)
        h = modulated_norm(h, shift, scale)
        return self.proj_out(h.to(self.dtype)).float()
