"""The memory of a fast flow's activations, laid out anew for each number of rows."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosyq.model.config import FlowConfig
from cosyq.runtime.transfer import Mark

TOKENS = 32  # what their number is rounded up to, before the first step
FINE_TOKENS = 512  # beyond so many, four times that
SEGMENTS = 32  # at most, that an utterance goes on from
BESIDE_ITS_OWN = 2  # tokens before those of an utterance's frames that matter to them


def padded_tokens(count: int) -> int:
    """Numbers that share graphs: of many tokens few."""
    step = TOKENS if count <= FINE_TOKENS else 4 * TOKENS
    return -(-count // step) * step


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
    now: Tensor


@dataclass(frozen=True)
class Sheet:
    """All that a call says, in one piece of memory, so that it is sent to the device as one."""

    memory: Tensor  # [n] int32; the rest are views of it
    now: Tensor  # [4] int64, the last unused, and the others as `kernels.dit` has them
    pasts: Tensor  # [tiles, 4] int64
    lists: Tensor  # [utterances, segments, 2] int64
    tiles: Tensor  # [tiles, 4] int32
    entries: Tensor  # [tiles, 5] int32
    tokens: Tensor  # [tokens] int32, -1 where there is none
    speakers: Tensor  # [utterances, speaker_dim] float32
    prompts: Tensor  # [frames, mel] float32


@dataclass(frozen=True)
class Blank:
    """A sheet on the host, to be written on and sent; its parts as arrays, which are written sooner than tensors."""

    memory: Tensor
    sent: Mark
    now: NDArray[np.int64]
    pasts: NDArray[np.int64]
    lists: NDArray[np.int64]
    tiles: NDArray[np.int32]
    entries: NDArray[np.int32]
    tokens: NDArray[np.int32]
    speakers: NDArray[np.float32]
    prompts: NDArray[np.float32]

    @classmethod
    def of(cls, s: Sheet, device: torch.device) -> Blank:
        parts = (s.now, s.pasts, s.lists, s.tiles, s.entries, s.tokens, s.speakers, s.prompts)
        return cls(s.memory, Mark(device), *(part.numpy() for part in parts))


@dataclass(frozen=True)
class Sizes:
    """How much there can be in a sheet. Two sheets differ in their prompts' frames only, which come last."""

    tiles: int
    tokens: int
    utterances: int
    speaker: int
    mel: int

    def sheet(self, frames: int, device: torch.device, *, pinned: bool = False) -> Sheet:
        """Of zeros."""
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
            ((4,), torch.int64),
            ((self.tiles, 4), torch.int64),
            ((self.utterances, SEGMENTS, 2), torch.int64),
            ((self.tiles, 4), torch.int32),
            ((self.tiles, 5), torch.int32),
            ((self.tokens,), torch.int32),
            ((self.utterances, self.speaker), torch.float32),
            ((frames, self.mel), torch.float32),
        ]
        counts = [prod(shape) * dtype.itemsize // 4 for shape, dtype in shapes]
        memory = torch.zeros(sum(counts), dtype=torch.int32, device=device, pin_memory=pinned)
        parts = zip(memory.split(counts), shapes, strict=True)
        return Sheet(memory, *(part.view(dtype).view(shape) for part, (shape, dtype) in parts))


class Room:
    """The memory of activations for up to `half` frames, all utterances together, none beyond `positions`.

    utterances: at most so many, in at most `tiles`.
    """

    def __init__(
        self, config: FlowConfig, half: int, tiles: int, positions: int, utterances: int,
        frequencies: Tensor, dtype: torch.dtype, device: torch.device,
    ):  # fmt: skip
        self.half, self.tiles, self.positions, self.utterances, self.config = half, tiles, positions, utterances, config
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
        self.given = self._memory["given"]  # as a view has it, whose rows lie there from its begin
        self._codes = torch.zeros(2 * half, c.dim, dtype=torch.int8, device=device)
        self._steps = torch.zeros(2 * half, device=device)
        self.x = torch.zeros(half, c.mel_dim, device=device)
        tokens = padded_tokens(half // c.token_mel_ratio + utterances * (BESIDE_ITS_OWN + 2 * c.lookahead))
        self.sizes = Sizes(tiles, tokens, utterances, c.speaker_dim, c.mel_dim)
        self.sheet = self.sizes.sheet(half, device)
        self._blanks: deque[Blank] = deque()
        self._views: dict[tuple[int, int], View] = {}
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)  # on the host, as it is little
        self._rope = angles.cos().to(device), angles.sin().to(device)

    def blank(self) -> Blank:
        """Of no tokens; what it said last has been sent."""
        device = self.sheet.memory.device
        if self._blanks and self._blanks[0].sent.passed:
            blank = self._blanks.popleft()
        else:
            sheet = self.sizes.sheet(self.half, torch.device("cpu"), pinned=device.type == "cuda")
            blank = Blank.of(sheet, device)
        blank.tokens.fill(-1)
        return blank

    def send(self, blank: Blank, frames: int) -> None:
        """What is written on it, to the device's sheet; so many frames of prompts are."""
        count = len(blank.memory) - blank.prompts[frames:].size
        self.sheet.memory[:count].copy_(blank.memory[:count], non_blocking=True)
        blank.sent.again()
        self._blanks.append(blank)

    def list_of(self, utterance: int) -> int:
        """The address of what it goes on from."""
        lists = self.sheet.lists
        return lists.data_ptr() + utterance * lists.stride(0) * lists.itemsize

    def view(self, half: int, tiles: int) -> View:
        key = half, tiles
        if key not in self._views:
            self._views[key] = self._view(half, tiles)
        return self._views[key]

    def _view(self, half: int, tiles: int) -> View:
        rows, c = 2 * half, self.config
        inner = c.heads * c.head_dim

        def part(name: str, width: int, first: int = 0) -> Tensor:
            return self._memory[name][rows * first : rows * (first + width)].view(rows, width)

        return View(
            x=self.x[:half],
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
            tiles=self.sheet.tiles[:tiles],
            pasts=self.sheet.pasts[:tiles],
            now=self.sheet.now,
        )
