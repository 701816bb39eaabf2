"""The speaker encoder: Kaldi fbank to a 192-number vector, a small TDNN with pooled statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.mini.config import MEL_BINS, SPEAKER_DIM

WIDTH = 96


class SpeakerEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shape = ((MEL_BINS, 5, 1), (WIDTH, 3, 2), (WIDTH, 3, 3), (WIDTH, 1, 1))
        self.layers = nn.ModuleList(
            nn.Conv1d(inputs, WIDTH, kernel, dilation=dilation, padding=(kernel - 1) * dilation // 2)
            for inputs, kernel, dilation in shape
        )
        self.project = nn.Linear(2 * WIDTH, SPEAKER_DIM)

    def forward(self, fbank: Tensor) -> Tensor:
        """fbank [b, t, 80] -> [b, 192]."""
        x = fbank.transpose(1, 2)
        for layer in self.layers:
            x = F.relu(layer(x))
        mean = x.mean(-1)
        spread = torch.sqrt((x - mean[..., None]).square().mean(-1) + 1e-5)
        return self.project(torch.cat([mean, spread], dim=-1))
