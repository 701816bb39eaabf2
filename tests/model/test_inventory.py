"""Networks without weights, and what they are made of."""

import pytest
import torch
from conftest import GOLDEN

from cosyq.checkpoint.reader import open_checkpoint
from cosyq.model.inventory import STAGES, inventory, skeleton


@pytest.mark.parametrize("stage", STAGES)
def test_a_skeleton_is_nobody_elses(stage):
    config = open_checkpoint(GOLDEN).config
    inventory.cache_clear()
    expected = inventory(stage, config, steps=(10,))
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    networks = [skeleton(stage, config, steps=(10,), dtype=dtype) for dtype in dtypes]
    assert len({id(m) for network in networks for m in network.modules()}) == sum(len([*n.modules()]) for n in networks)
    for network, dtype in zip(networks, dtypes, strict=True):
        assert {m.dtype for m in network.modules() if "dtype" in vars(m)} <= {dtype}
        assert stage == "vocoder" or any("dtype" in vars(m) for m in network.modules())
        assert all(p.is_meta and p.dtype == torch.float32 for p in network.parameters())
        assert {name: tuple(p.shape) for name, p in network.named_parameters()} == {
            f"{module.path}.{name}".lstrip("."): shape
            for module in expected
            if module.name != "llm.text_embedding"
            for name, shape in module.parameters.items()
        }
