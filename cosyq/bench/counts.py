"""The operations of the three networks, counted from their modules: as they are defined, whatever an engine does.

A multiplication and an addition are two. What is no product (norms, activations, the draw) is left out: it is a
thousandth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from cosyq.model.config import FlowConfig, LLMConfig, VocoderConfig
from cosyq.model.inventory import Module

BRANCHES = 2  # of the flow's classifier-free guidance


@dataclass(frozen=True)
class Operations:
    """By what they are."""

    products: int  # with a layer's weights
    convolutions: int
    attention: int = 0

    @property
    def total(self) -> int:
        return self.products + self.convolutions + self.attention


def llm_operations(modules: Sequence[Module], config: LLMConfig, *, new: int, past: int) -> Operations:
    """Of `new` positions after `past`, and the logits of the last."""

    def positions(name: str) -> int:
        return {"layers": new, "head": 1}.get(name.split(".")[1], 0)  # embeddings are looked up

    pairs = new * past + new * (new + 1) // 2
    return _weighted(modules, positions, 4 * config.num_layers * config.num_heads * config.head_dim * pairs)


def flow_operations(modules: Sequence[Module], config: FlowConfig, *, tokens: int, steps: int) -> Operations:
    """Of all frames of an utterance at once, attending everywhere; `tokens` with the prompt's."""
    frames = config.token_mel_ratio * tokens
    passes = BRANCHES * steps

    def positions(name: str) -> int:
        return {"estimator": passes * frames, "token_encoder": tokens, "speaker_proj": 1}.get(name.split(".")[1], 0)

    attention = 4 * config.depth * config.heads * config.head_dim * frames * frames * passes
    return _weighted(modules, positions, attention)


def vocoder_operations(modules: Sequence[Module], config: VocoderConfig, *, frames: int) -> Operations:
    rates = [prod(config.upsample_rates[: stage + 1]) for stage in range(len(config.upsample_rates))]
    kernels = len(config.resblock_kernels)

    def a_frame(name: str) -> int:
        """How many columns of the module's output a frame has."""
        layer, *inner = name.split(".")[1:]
        if layer in ("ups", "source_downs", "source_resblocks"):
            return rates[int(inner[0])]
        if layer == "resblocks":
            return rates[int(inner[0]) // kernels]
        return {"source": config.samples_per_frame, "conv_post": config.stft_per_frame}.get(layer, 1)

    return _weighted(modules, lambda name: a_frame(name) * frames)


def _weighted(modules: Sequence[Module], positions: Callable[[str], int], attention: int = 0) -> Operations:
    """Every weight is used once for each position of its module's output."""
    products = convolutions = 0
    for module in modules:
        shape = module.parameters.get("weight") or module.parameters.get("weight_v") or ()
        if len(shape) < 2:
            continue
        done = 2 * prod(shape) * positions(module.name)
        if len(shape) == 2:
            products += done
        else:
            convolutions += done
    return Operations(products, convolutions, attention)
