"""What a stage could take at best: its bytes at the rate the device copies, its operations at the rate it multiplies.

The bytes are those that an engine keeps on the device, so that one that unpacked its weights has a higher floor. A
model that fits a CPU's caches is read faster than its memory copies: then a time can be below its floor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cosyq.artifact.reader import Artifact
from cosyq.bench.counts import Operations, flow_operations, llm_operations, vocoder_operations
from cosyq.bench.machine import Rates
from cosyq.model.config import LLMConfig
from cosyq.model.inventory import STAGES, Stage

LOOKED_UP = ("speech_embedding", "token_embedding", "adaln")  # rows of them, and no more


@dataclass(frozen=True)
class Floor:
    """bytes: read from the device's memory at least once; operations: a product and its sum are two."""

    bytes: int
    operations: int
    seconds: float

    @classmethod
    def of(cls, read: int, operations: Operations, rates: Rates) -> Floor:
        return cls(
            read, operations.total, max(read / rates.bytes_per_second, operations.total / rates.operations_per_second)
        )


@dataclass(frozen=True)
class Floors:
    """prefill: of the prompt. token: of one id in the middle of the utterance. flow, vocoder: of all of it."""

    prefill: Floor
    token: Floor
    flow: Floor
    vocoder: Floor


def floors(
    artifact: Artifact,
    held: Mapping[str, int],
    rates: Rates,
    *,
    positions: int,
    prompt: int,
    tokens: int,
    steps: int,
    itemsize: int,
) -> Floors:
    """Of an utterance of `tokens` speech ids.

    Args:
        held: bytes of each stage, as an engine has them.
        positions: of the language model's prompt.
        prompt: ids that the flow is shown before the utterance.
        itemsize: bytes of a number of the keys and values.
    """
    model = artifact.manifest.model
    read, modules = weights_read(artifact, held), {stage: artifact.modules(stage) for stage in STAGES}
    middle = positions + tokens // 2
    return Floors(
        prefill=Floor.of(
            read["llm"] + positions * _cached(model.llm, itemsize),
            llm_operations(modules["llm"], model.llm, new=positions, past=0),
            rates,
        ),
        token=Floor.of(
            read["llm"] + middle * _cached(model.llm, itemsize),
            llm_operations(modules["llm"], model.llm, new=1, past=middle),
            rates,
        ),
        flow=Floor.of(
            steps * read["flow"],
            flow_operations(modules["flow"], model.flow, tokens=prompt + tokens, steps=steps),
            rates,
        ),
        vocoder=Floor.of(
            read["vocoder"],
            vocoder_operations(modules["vocoder"], model.vocoder, frames=model.flow.token_mel_ratio * tokens),
            rates,
        ),
    )


def weights_read(artifact: Artifact, held: Mapping[str, int]) -> dict[Stage, int]:
    """Bytes of each stage's weights that one pass reads: all but tables, which are held as they are stored."""
    size = {record.name: record.bytes for record in artifact.manifest.modules}
    return {stage: held[stage] - sum(size.get(f"{stage}.{name}", 0) for name in LOOKED_UP) for stage in STAGES}


def _cached(config: LLMConfig, itemsize: int) -> int:
    """Bytes of a position's keys and values."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
