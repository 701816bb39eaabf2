"""The memory of a fast flow's activations, laid out anew for each number of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cosyq.model.config import FlowConfig

TOKENS = 32  # what their number is rounded up to, before the first step


@dataclass(frozen=True)
class View:
    """Activations of one number of rows; `half` of them conditional, as many not. In the flow's type unless said."""

    x: Tensor  # [half, mel] float32
    given: Tensor  # x and the condition, [rows, 2 * mel + token + mel]
    residual: Tensor  # [rows, dim] float32
    normed: Tensor  # [rows, dim]
    coded: tuple[Tensor, Tensor]  # the same as int8 codes, and what a code of each row is, float32 [rows]
    context: Tensor  # [rows, inner], the same memory
    qkv: Tensor  # [rows, 3 * inner]
    hidden: Tensor  # [rows, ff_dim], the same memory
    change: Tensor  # [rows, dim], the same memory, but not the hidden's
    velocity: Tensor  # [rows, mel]
    rope: tuple[Tensor, Tensor]  # [positions, head_dim / 2] float32
    tiles: Tensor
    pasts: Tensor

    def clear(self) -> None:
        """No condition."""
        self.given[:, self.x.shape[1] :] = 0

    def begin(self, first: int, frames: slice, noise: Tensor, prompt: Tensor, told: Told) -> None:
        """Enter some frames of an utterance, from row `first`: their noise, and their condition where there is none."""
        mel, rows = self.x.shape[1], slice(first, first + frames.stop - frames.start)
        self.x[rows] = noise[frames]
        both = self.given.view(2, len(self.x), -1)
        both[:, rows, :mel] = noise[frames]
        condition = both[0, rows, mel:]
        condition[: max(len(prompt) - frames.start, 0), :mel] = prompt[frames]
        condition[:, mel:-mel] = told.encoded[frames]
        condition[:, -mel:] = told.voice


@dataclass(frozen=True)
class Told:
    """An utterance's tokens and speaker, and what the estimator is told of them, float32."""

    tokens: Tensor  # [n] int64, -1 after the last
    speaker: Tensor  # [speaker_dim]
    encoded: Tensor  # [n * token_mel_ratio, token_dim]
    voice: Tensor  # [mel]


class Room:
    """The memory of activations for up to `half` frames, all utterances together, none beyond `positions`."""

    def __init__(
        self, config: FlowConfig, half: int, tiles: int, positions: int, frequencies: Tensor, dtype: torch.dtype
    ):
        self.half, self.tiles, self.positions, self.config = half, tiles, positions, config
        device = frequencies.device
        c, inner = config, config.heads * config.head_dim
        self._widths = {
            "given": 3 * c.mel_dim + c.token_dim,
            "residual": c.dim,
            "normed": max(c.dim, inner),
            "wide": max(3 * inner, c.ff_dim + c.dim),
            "velocity": c.mel_dim,
        }
        self._memory = {
            name: torch.zeros(2 * half * width, dtype=torch.float32 if name == "residual" else dtype, device=device)
            for name, width in self._widths.items()
        }
        self._codes = torch.zeros(2 * half, c.dim, dtype=torch.int8, device=device)
        self._steps = torch.zeros(2 * half, device=device)
        self._x = torch.zeros(half, c.mel_dim, device=device)
        self._table = torch.zeros(tiles, 4, dtype=torch.int32, device=device)
        self._pasts = torch.zeros(tiles, 3, dtype=torch.int64, device=device)
        tokens = -(-(positions // c.token_mel_ratio + c.lookahead) // TOKENS) * TOKENS
        self._tokens = torch.zeros(tokens, dtype=torch.int64, device=device)
        self._encoded = torch.zeros(tokens * c.token_mel_ratio, c.token_dim, device=device)
        self._speaker, self._voice = (torch.zeros(n, device=device) for n in (c.speaker_dim, c.mel_dim))
        angles = torch.outer(torch.arange(positions, device=device, dtype=torch.float32), frequencies)
        self._rope = angles.cos(), angles.sin()

    def told(self, count: int) -> Told:
        encoded = self._encoded[: count * self.config.token_mel_ratio]
        return Told(self._tokens[:count], self._speaker, encoded, self._voice)

    def view(self, half: int, tiles: int) -> View:
        rows, c = 2 * half, self.config
        inner = c.heads * c.head_dim

        def part(name: str, width: int, first: int = 0) -> Tensor:
            return self._memory[name][rows * first : rows * (first + width)].view(rows, width)

        return View(
            x=self._x[:half],
            given=part("given", self._widths["given"]),
            residual=part("residual", c.dim),
            normed=part("normed", c.dim),
            coded=(self._codes[:rows], self._steps[:rows]),
            context=part("normed", inner),
            qkv=part("wide", 3 * inner),
            hidden=part("wide", c.ff_dim),
            change=part("wide", c.dim, c.ff_dim),
            velocity=part("velocity", c.mel_dim),
            rope=self._rope,
            tiles=self._table[:tiles],
            pasts=self._pasts[:tiles],
        )
