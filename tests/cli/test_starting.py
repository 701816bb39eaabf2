"""The time until an engine speaks."""

import gc
import sys
from pathlib import Path

import pytest
import torch

from cosyq.artifact import ahead
from cosyq.cli.starting import starting


@pytest.mark.parametrize("before", [True, False])
def test_the_collector_rests_within_and_all_is_as_it_was_behind(tmp_path, before):
    switch = sys.getswitchinterval()
    try:
        if not before:
            gc.disable()
        with starting(tmp_path, "cpu"):
            assert not gc.isenabled()
            assert sys.getswitchinterval() < 0.001
            young = [[] for _ in range(2000)]  # a few may be used again, and are not counted
            assert gc.get_count()[0] >= 1000
        assert (gc.isenabled(), sys.getswitchinterval()) == (before, switch)
        assert gc.get_freeze_count() == 0
        assert not before or gc.get_count()[0] < 1000, "what is there is old"
        del young
        with pytest.raises(KeyError), starting(tmp_path, "cpu"):
            raise KeyError
        assert gc.isenabled() == before
    finally:
        gc.enable()
        sys.setswitchinterval(switch)


@pytest.mark.parametrize(
    ("arguments", "kernels"),
    [
        (("auto",), ("cuda", torch.bfloat16)),
        (("cuda:1", "fp16", "fused8"), ("cuda:1", torch.float16)),
        (("cuda", "fp32", "fused"), ("cuda", torch.float32)),
        (("cuda", "auto", "reference"), None),
        (("auto", "auto", "auto", "no GPU"), None),
    ],
)
def test_what_a_gpu_needs_is_begun_behind_its_context(monkeypatch, arguments, kernels):
    done, asked = [], arguments[:3]
    module, gpu = sys.modules["cosyq.cli.starting"], len(arguments) < 4

    class Thread:
        def __init__(self, name):
            self.join = lambda: done.append(f"{name} is over")

    def context(device, then):
        done.append(device)
        then("driver", 1 if gpu else None)
        return Thread("context")

    def begin_kernels(device, dtype):
        done.append((str(device), dtype))
        return Thread("kernels")

    monkeypatch.setattr(module, "begin_context", context)
    monkeypatch.setattr(module.apart, "begin", lambda path: done.append("tokenizer"))
    monkeypatch.setattr(ahead, "read", lambda *about: done.append((about, sorted(path.name for path in ahead._begun))))
    monkeypatch.setattr(module, "begin_kernels", begin_kernels)
    with pytest.raises(IndexError), starting(Path("folder"), *asked):
        done.pop(-100)
    files = ["flow.safetensors", "llm.safetensors", "vocoder.safetensors"]
    expected = [
        "tokenizer",
        asked[0],
        (("driver", 1 if gpu else None), files),
        *([kernels] if kernels else []),
        "context is over",
        *(["kernels is over"] if kernels else []),
    ]
    assert done == expected
    assert ahead._begun == {}
