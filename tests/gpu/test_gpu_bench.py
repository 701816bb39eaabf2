"""`cosyq bench` on a CUDA machine: every part, of the published size; over HTTP where the server's packages are."""

import json
import os

import pytest
import torch

from cosyq.server import missing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs TRITON_INTERPRET=0"),
]


def test_everything_is_measured(cli):
    code, out, err = cli("bench", "--random", "full", "--parts", "all", "--device", "cuda", "--json")
    assert code == 0, err
    found = json.loads(out)
    print(found["about"], *(" | ".join(row) for row in found["rows"]), sep="\n")
    assert (found["engine"], found["dtype"], found["threads"]) == ("fused", "bfloat16", None)
    for name, took in {
        "prefill": found["language_model"]["prefill_seconds"],
        "token": found["language_model"]["token_seconds"],
        "flow": found["flow"]["run_seconds"],
        "vocoder": found["vocoder"]["run_seconds"],
    }.items():
        # A card's rates are steady: nothing is faster than its floor by more than a probe can be off.
        assert took["median"] > 0.8 * found["floors"][name]["seconds"]
    memory = found["memory_bytes"]
    assert sum(memory["weights"].values()) < memory["loaded"]["used"] <= memory["spoken"]["peak"]
    assert memory["spoken"]["peak"] <= memory["spoken"]["peak_reserved"]
    assert [(s["streams"], s["rows"]) for s in found["streams"]] == [(1, 16), (4, 16), (16, 16)]
    assert ("served" in found) == (not missing())
    if served := found.get("served"):
        assert [(s["streams"], s["rows"]) for s in served["streams"]] == [(1, 16), (4, 16), (16, 16)]
        assert served["first_audio_cost_seconds"]["median"] < 0.005
    assert found["cold"]["ratio"] > 1
