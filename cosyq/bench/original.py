"""The original implementation's figures, for those who measure on the same kind of card.

Its own code in float32 under transformers 5.17 and torch 2.11, full-size random weights, batch 1, ten seconds of audio
after a prompt of three; one H100 80 GB, 2026-11-23 (docs/numbers.md). Measured once, elsewhere: it is no part of cosyq.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosyq.model.config import ModelConfig

CARD = "NVIDIA H100 80GB"
SECONDS, PROMPT_SECONDS = 10, 3
DIMENSIONS = (896, 24, 1024, 22, 512)  # of the published model, which tell it from any other of ours


@dataclass(frozen=True)
class Original:
    tokens_per_second: float = 47.9
    flow_seconds: float = 0.263
    vocoder_seconds: float = 0.035
    real_time_factor: float = 0.553
    peak_bytes: int = 3481 << 20
    cold_seconds: float = 29.8
    cold_ratio: float = 6.9


def original_on(device_name: str, config: ModelConfig, seconds: float, prompt_seconds: float) -> Original | None:
    """Its figures, if they are of the same card, model and work."""
    dimensions = (
        config.llm.hidden_size,
        config.llm.num_layers,
        config.flow.dim,
        config.flow.depth,
        config.vocoder.base_channels,
    )
    same = device_name.startswith(CARD) and dimensions == DIMENSIONS
    return Original() if same and seconds == SECONDS and round(prompt_seconds) == PROMPT_SECONDS else None
