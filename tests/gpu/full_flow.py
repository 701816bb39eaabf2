"""A full-size flow of random weights, made on the device it runs on; the same for every type of arithmetic."""

import torch
from torch import Tensor, nn

from cosyq.model.config import FlowConfig
from cosyq.model.flow import Flow
from cosyq.quantize.formats import Format
from cosyq.quantize.linear import DequantLinear

FULL = FlowConfig(
    vocab=6561, token_dim=80, mel_dim=80, speaker_dim=192, token_mel_ratio=2, lookahead=3, lookahead_channels=1024,
    dim=1024, depth=22, heads=16, head_dim=64, ff_dim=2048, conv_kernel=31, conv_groups=16, chunk_frames=50,
    guidance=0.7,
)  # fmt: skip
# QLoRA's levels (arXiv 2305.14314), to three places
NF4 = (-1, -0.696, -0.525, -0.395, -0.284, -0.185, -0.091, 0, 0.080, 0.161, 0.246, 0.338, 0.441, 0.563, 0.723, 1)


def random_flow(
    fmt: Format, dtype: torch.dtype, device: torch.device, config: FlowConfig = FULL, steps: tuple[int, ...] = (10,)
) -> Flow:
    """The matrices of its blocks in `fmt`, all else stored in bf16; arithmetic in `dtype`."""
    generator = torch.Generator(device).manual_seed(5)
    with torch.device("meta"):
        flow = Flow(config, steps, dtype)
    for name, parameter in list(flow.named_parameters()):
        path, _, leaf = name.rpartition(".")
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
        value = torch.randn(parameter.shape, generator=generator, device=device) * (0.7 / fan_in**0.5)
        if name.startswith("adaln"):
            value *= 0.5 * fan_in**0.5
        elif leaf == "rope_frequencies":
            count = parameter.numel()
            value = 10000.0 ** -(torch.arange(count, device=device) / count)
        elif path != "token_embedding":
            value = value.bfloat16().to(dtype)
        owner = flow.get_submodule(path) if path else flow
        owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    if not fmt.is_float:
        for name, layer in list(flow.estimator.blocks.named_modules()):
            if isinstance(layer, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                packed = DequantLinear(fmt, tuple(layer.weight.shape), _pack(layer.weight.float(), fmt), layer.bias)
                setattr(flow.estimator.blocks.get_submodule(parent), leaf, packed)
    return flow.eval()


def _pack(weight: Tensor, fmt: Format) -> dict[str, Tensor]:
    if fmt.name == "int8":
        absmax = weight.abs().amax(dim=1)
        return {"weight": (weight / absmax[:, None] * 127).round().to(torch.int8), "SCB": absmax}
    blocks = weight.view(-1, fmt.blocksize)
    absmax, levels = blocks.abs().amax(dim=1), torch.tensor(NF4, device=weight.device)
    nearest = (blocks / absmax[:, None]).view(-1, 1).sub(levels).abs().argmin(dim=1).to(torch.uint8)
    return {
        "weight": (nearest[0::2] << 4 | nearest[1::2])[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": levels,
    }
