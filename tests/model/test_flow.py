import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, relative

from cosyq.artifact.reader import load_stage, open_artifact
from cosyq.model.flow import start_noise, time_embedding, time_steps

CASES = {"full": (False, True), "stream_final": (True, True), "stream_chunk": (True, False), "noprompt": (False, True)}


@pytest.fixture(scope="module")
def flow(artifact_of):
    artifact = open_artifact(artifact_of("fp32"))
    return load_stage(artifact, "flow", device=torch.device("cpu"), dtype=torch.float32, matmul="dequantize")


def render(flow, golden, case, tokens=None, **how):
    inputs = {key: golden[f"flow.{case}.{key}"][0] for key in ("token", "prompt_token", "prompt_feat", "embedding")}
    generated = inputs["token"] if tokens is None else inputs["token"][:tokens]
    ids = torch.cat([inputs["prompt_token"], generated]).long()
    with torch.inference_mode():
        return flow(ids, inputs["embedding"], inputs["prompt_feat"], start_noise(flow.config), steps=10, **how)


@pytest.mark.parametrize("case", CASES)
def test_mel_equals_the_original(flow, golden, case):
    streaming, final = CASES[case]
    found = render(flow, golden, case, streaming=streaming, final=final)
    assert relative(found, golden[f"flow.{case}.mel"][0]) < 2e-5  # ten steps amplify float32; the bound asked is 2e-4


def test_the_fixed_noise_is_the_original_s(flow, golden):
    head = golden["flow.noise_head"][0]
    assert torch.equal(start_noise(flow.config)[: head.shape[1]].T, head)


def test_a_chunk_that_ends_at_a_block_equals_the_whole_stream(flow, golden):
    """Blocks count from the start of the prompt (25 tokens here), three tokens of look-ahead held back."""
    whole = render(flow, golden, "stream_final", streaming=True, final=True)
    for tokens in (25, 50):
        chunk = render(flow, golden, "stream_final", tokens + 3, streaming=True, final=False)
        assert chunk.shape[1] == 2 * tokens
        assert relative(chunk, whole[:, : 2 * tokens]) < 1e-5


def test_a_chunk_that_ends_inside_a_block_does_not(flow, golden):
    """Why the schedule renders at block ends only."""
    whole = render(flow, golden, "stream_final", streaming=True, final=True)
    chunk = render(flow, golden, "stream_final", 33, streaming=True, final=False)
    assert relative(chunk, whole[:, :60]) > 1e-3


def test_adaln_tables_equal_the_projections_they_replace(flow):
    """The published layers, evaluated as the original does at every step, against the table."""
    state = torch.load(GOLDEN / "flow.pt", weights_only=True)
    dit = "decoder.estimator"

    def linear(x, name):
        return F.linear(x, state[f"{dit}.{name}.weight"], state[f"{dit}.{name}.bias"])

    table = flow.adaln["10"]
    for row, time in zip(table, time_steps(10)[0], strict=True):
        t = linear(time_embedding([time], 256), "time_embed.time_mlp.0")
        t = F.silu(linear(F.silu(t), "time_embed.time_mlp.2"))
        blocks = [linear(t, f"transformer_blocks.{i}.attn_norm.linear") for i in range(flow.config.depth)]
        direct = torch.cat([*blocks, linear(t, "norm_out.linear")], dim=-1)[0]
        assert relative(row, direct) < 2e-6  # float32 sums of 128 products against the float64 result rounded once


def test_the_cosine_schedule():
    times, sizes = time_steps(10)
    assert times[0] == 0
    assert abs(times[-1] + sizes[-1] - 1) < 1e-6
    assert sizes == sorted(sizes)


def test_an_utterance_beyond_the_noise_is_refused(flow):
    tokens = torch.zeros(60, dtype=torch.int64)
    with pytest.raises(ValueError, match="120 frames asked for, the fixed noise covers 100"):
        flow(tokens, torch.zeros(192), torch.zeros(0, 80), torch.zeros(100, 80), streaming=False, final=True, steps=10)
