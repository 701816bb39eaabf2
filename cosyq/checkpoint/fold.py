"""What is worked out once at build time: weight norm, and AdaLN for fixed timesteps."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cosyq.checkpoint.tensors import LazyTensor
from cosyq.errors import CheckpointError
from cosyq.model.config import FlowConfig
from cosyq.model.flow import time_embedding, time_steps


def fold_weight_norm(length: Tensor, direction: Tensor) -> Tensor:
    """g [out, 1, 1] and v [out, in, kernel] -> g v / |v|, the product taken in float64, returned in float32."""
    v = direction.double()
    return (v * (length.double() / v.norm(dim=(1, 2), keepdim=True))).float()


def _fold_pair(length: LazyTensor, direction: LazyTensor) -> Tensor:
    return fold_weight_norm(length.read(), direction.read())


def folded(tensors: dict[str, LazyTensor], keep: str) -> dict[str, LazyTensor]:
    """Replace each `weight_g`/`weight_v` pair by its `weight`, except under the prefix `keep`.

    Raises:
        CheckpointError: half of a pair is missing.
    """
    result = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight_g", "weight_v") or name.startswith(keep):
            result[name] = tensor
            continue
        g, v = tensors.get(f"{module}.weight_g"), tensors.get(f"{module}.weight_v")
        if g is None or v is None:
            raise CheckpointError(f"{tensor.names[0]} has no other half of its weight norm")
        if g.shape != (v.shape[0], *[1] * (len(v.shape) - 1)):
            raise CheckpointError(f"{g.names[0]} has shape {list(g.shape)}, {v.names[0]} has {list(v.shape)}")
        result[f"{module}.weight"] = LazyTensor(g.names + v.names, v.shape, v.dtype, partial(_fold_pair, g, v))
    return result


def adaln_sources(config: FlowConfig, time_width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the AdaLN tables are made from."""
    shapes = {
        "adaln.time.0.weight": (config.dim, time_width),
        "adaln.time.0.bias": (config.dim,),
        "adaln.time.2.weight": (config.dim, config.dim),
        "adaln.time.2.bias": (config.dim,),
        "adaln.out.weight": (2 * config.dim, config.dim),
        "adaln.out.bias": (2 * config.dim,),
    }
    for block in range(config.depth):
        shapes[f"adaln.blocks.{block}.weight"] = (6 * config.dim, config.dim)
        shapes[f"adaln.blocks.{block}.bias"] = (6 * config.dim,)
    return shapes


def adaln_table(tensors: dict[str, LazyTensor], config: FlowConfig, steps: int) -> Tensor:
    """Every block's shift, scale and gate for the `steps` times of the solver.

    The times do not depend on the utterance, so these numbers replace 43 % of the flow's parameters. The
    sinusoids keep float32, as in training; the projections are float64, so the table is the exact result
    rounded once.

    Returns [steps, modulation_width] float32: per block six vectors of `dim`, then scale and shift of the
    last norm.
    """

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"].read().double(), tensors[f"{name}.bias"].read().double())

    width = tensors["adaln.time.0.weight"].shape[1]
    t = time_embedding(time_steps(steps)[0], width).double()
    t = F.silu(linear(F.silu(linear(t, "adaln.time.0")), "adaln.time.2"))
    parts = [linear(t, f"adaln.blocks.{block}") for block in range(config.depth)]
    return torch.cat([*parts, linear(t, "adaln.out")], dim=-1).float()
