"""What the networks are made of: every module that owns parameters, by name, kind and shapes.

The plan decides over this list, the writer and the reader derive the tensors of an artifact from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cosyq.model.config import ModelConfig
from cosyq.model.flow import Flow
from cosyq.model.llm import LanguageModel
from cosyq.model.vocoder import Vocoder

Stage = Literal["llm", "flow", "vocoder"]
STAGES: tuple[Stage, ...] = ("llm", "flow", "vocoder")

# matrix: a large linear layer, what quantization is for      edge: a small one that a stage enters or leaves by
# embedding: a table of rows that are looked up               conv: a convolution
# exact: norms, tables, activations, pitch: always float32
Kind = Literal["matrix", "edge", "embedding", "conv", "exact"]


@dataclass(frozen=True)
class Module:
    """One module: `name` begins with its stage; `parameters` are its own, without those of its children."""

    name: str
    kind: Kind
    parameters: dict[str, tuple[int, ...]]

    @property
    def stage(self) -> str:
        return self.name.partition(".")[0]

    @property
    def path(self) -> str:
        """The name inside the stage's network."""
        return self.name.partition(".")[2]


class _Uninitialised(TorchFunctionMode):
    """Leaves new parameters alone: on the meta device, initialising them would import torch's compiler."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


# Networks that `inventory` has looked at, for `skeleton` to give away: one takes 7 ms.
_spare: dict[tuple[Stage, ModelConfig, tuple[int, ...]], nn.Module] = {}


def skeleton(stage: Stage, config: ModelConfig, *, steps: tuple[int, ...], dtype: torch.dtype) -> nn.Module:
    """The stage's network on the meta device, float32, computing in `dtype`."""
    network = _spare.pop((stage, config, steps), None) or _network(stage, config, steps)
    for module in network.modules():
        if "dtype" in vars(module):
            module.dtype = dtype
    return network


def _network(stage: Stage, config: ModelConfig, steps: tuple[int, ...]) -> nn.Module:
    with torch.device("meta"), _Uninitialised():
        if stage == "llm":
            return LanguageModel(config.llm)
        if stage == "flow":
            return Flow(config.flow, steps)
        return Vocoder(config.vocoder)


@lru_cache(maxsize=16)
def inventory(stage: Stage, config: ModelConfig, *, steps: tuple[int, ...]) -> tuple[Module, ...]:
    """The stage's modules in the order of its network; the LLM's begin with the text embedding, a host's look-up."""
    network = _spare[stage, config, steps] = _network(stage, config, steps)
    modules = _modules(stage, network)
    if stage == "llm":
        shape = (config.llm.text_rows, config.llm.hidden_size)
        return (Module("llm.text_embedding", "embedding", {"weight": shape}), *modules)
    return tuple(modules)


def _modules(stage: Stage, network: nn.Module) -> Iterator[Module]:
    for path, module in network.named_modules():
        own = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
        if own:
            name = f"{stage}.{path}" if path else stage
            yield Module(name, _kind(stage, path, module), own)


def _kind(stage: Stage, path: str, module: nn.Module) -> Kind:
    if isinstance(module, nn.Linear):
        if stage == "vocoder":
            return "exact"
        return "edge" if stage == "flow" and not path.startswith("estimator.blocks.") else "matrix"
    if isinstance(module, nn.Embedding):
        return "embedding" if stage == "llm" else "edge"
    if isinstance(module, nn.Conv1d):
        return "conv"
    return "exact"
