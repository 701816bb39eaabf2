"""Speech tokens to mel frames: token encoder, classifier-free guidance and the Euler solver.

Conditional flow matching (arXiv 2210.02747) as in CosyVoice 2/3. Offline attends everywhere; streaming
attends block by block, counted from the start of the prompt, and stays so to the last block, so that a
stream equals one block-causal pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyq.model.config import FlowConfig
from cosyq.model.dit import DiT, block_causal_mask


def nothing() -> None:
    """What is done between two steps, where nobody wants more."""


def time_steps(steps: int) -> tuple[list[float], list[float]]:
    """Times and step sizes of the cosine schedule, `steps` each.

    The float32 roundings of the original solver, which adds up its own steps, are kept: the AdaLN
    tables are computed for exactly these times.
    """
    span = 1 - torch.cos(torch.linspace(0, 1, steps + 1) * 0.5 * torch.pi)
    t, dt = span[0], span[1] - span[0]
    times, sizes = [], []
    for step in range(1, steps + 1):
        times.append(t.item())
        sizes.append(dt.item())
        t = t + dt
        if step < steps:
            dt = span[step + 1] - t
    return times, sizes


def time_embedding(times: list[float], width: int) -> Tensor:
    """Sinusoids of the times, [len(times), width] float32."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))
    angles = 1000 * torch.tensor(times).unsqueeze(1) * frequencies.unsqueeze(0)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def start_noise(config: FlowConfig) -> Tensor:
    """The fixed noise that every utterance starts from, [noise_frames, mel] float32 on the host.

    Frame i always gets the same numbers, so a chunk agrees with the whole.
    """
    generator = torch.Generator().manual_seed(config.noise_seed)
    noise = torch.randn(1, config.mel_dim, config.noise_frames, generator=generator)
    return noise[0].T.contiguous()


def normalized(speaker: Tensor) -> Tensor:
    """Speakers' vectors [..., dim], float32, of length one."""
    return F.normalize(speaker.float(), dim=-1)


class TokenEncoder(nn.Module):
    """Embeds tokens and mixes in the few that follow."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.lookahead = config.lookahead
        self.conv1 = nn.Conv1d(config.token_dim, config.lookahead_channels, config.lookahead + 1)
        self.conv2 = nn.Conv1d(config.lookahead_channels, config.token_dim, 3)

    def forward(self, x: Tensor, final: bool) -> Tensor:
        """x [b, n, token_dim] -> [b, n, token_dim], or `lookahead` fewer when more tokens will follow."""
        kept = x if final else x[:, : -self.lookahead]
        h = x.to(self.conv1.weight.dtype).transpose(1, 2)
        if final:
            h = F.pad(h, (0, self.lookahead))
        h = F.leaky_relu(self.conv1(h))
        h = self.conv2(F.pad(h, (self.conv2.kernel_size[0] - 1, 0)))
        return kept + h.transpose(1, 2).float()


class Flow(nn.Module):
    """Speech tokens, a speaker and a prompt to mel frames.

    `adaln` maps a number of Euler steps to its modulation table, [steps, modulation_width] float32.
    """

    def __init__(self, config: FlowConfig, steps: tuple[int, ...], dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab, config.token_dim)
        self.token_encoder = TokenEncoder(config)
        self.speaker_proj = nn.Linear(config.speaker_dim, config.mel_dim)
        self.estimator = DiT(config, dtype)
        self.adaln = nn.ParameterDict({str(n): nn.Parameter(torch.empty(n, config.modulation_width)) for n in steps})

    def condition(self, tokens: Tensor, speaker: Tensor, prompt_mel: Tensor, *, final: bool) -> Tensor:
        """What the estimator is told of every frame, [frames, mel + token + mel] float32; arguments as in `forward`."""
        embedded = self.token_embedding(tokens).float().unsqueeze(0)
        mu = self.token_encoder(embedded, final).repeat_interleave(self.config.token_mel_ratio, dim=1)[0]
        voice = self.told_of(normalized(speaker))
        prompt = F.pad(prompt_mel, (0, 0, 0, mu.shape[0] - prompt_mel.shape[0]))
        return torch.cat([prompt, mu, voice.expand(mu.shape[0], -1)], dim=-1)

    def told_of(self, speaker: Tensor) -> Tensor:
        """What the estimator is told of a speaker, or of several, normalized: [..., mel] float32."""
        dtype = self.token_encoder.conv1.weight.dtype  # the projection may be packed, and have none
        return self.speaker_proj(speaker.to(dtype)).float()

    def forward(
        self,
        tokens: Tensor,
        speaker: Tensor,
        prompt_mel: Tensor,
        noise: Tensor,
        *,
        streaming: bool,
        final: bool,
        steps: int,
        between: Callable[[], None] = nothing,
    ) -> Tensor:
        """Solve the flow for one utterance.

        Args:
            tokens: prompt and speech ids, [n] int64; when not `final` the last `lookahead` are only looked at.
            speaker: speaker vector, [speaker_dim] float32, of any length.
            prompt_mel: [p, mel] float32, the frames of the first p / token_mel_ratio tokens.
            noise: at least as many frames as there are to render, [frames, mel] float32.
            streaming: block-causal attention instead of full.
            final: no token will follow.
            steps: Euler steps, one of the tables' keys.
            between: called before each Euler step; what it raises ends the work.

        Returns the mel of everything after the prompt, [mel, frames - p] float32.
        """
        table = self.adaln[str(steps)]
        given = self.condition(tokens, speaker, prompt_mel, final=final)
        frames, prompt_frames = given.shape[0], prompt_mel.shape[0]
        if frames > noise.shape[0]:
            raise ValueError(f"{frames} frames asked for, the fixed noise covers {noise.shape[0]}")
        condition = torch.stack([given, torch.zeros_like(given)])  # the second branch is unconditional

        mask = block_causal_mask(frames, self.config.chunk_frames, tokens.device) if streaming else None
        x = noise[:frames]
        for row, dt in zip(table, time_steps(steps)[1], strict=True):
            between()
            conditional, free = self.estimator(x.expand(2, -1, -1), condition, row, mask)
            velocity = (1 + self.config.guidance) * conditional - self.config.guidance * free
            x = x + dt * velocity
        return x[prompt_frames:].T
