"""The engine `fused` at full size against the reference: `TRITON_INTERPRET=0 pytest -m gpu tests/gpu` on a CUDA machine.

Weights are random; the reference computes in float32, and what bfloat16 costs is measured beside it.
"""

import os

import pytest
import torch
from conftest import relative

import cosyq
from cosyq.artifact.reader import open_artifact
from cosyq.cli.main import run
from cosyq.model.vocoder import StreamState
from cosyq.runtime.batch import BatchDecoder
from cosyq.runtime.decode import Part
from cosyq.runtime.engine import Chunk, TorchEngine
from cosyq.runtime.rendering import Rendering
from cosyq.voices.voice import load_voice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs TRITON_INTERPRET=0"),
]
TEXT = list(range(100, 140))
ROOM = 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full") / "checkpoint"
    assert run(["checkpoint", "random", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module", params=["int8", "nf4", "bf16"])
def engines(request, checkpoint):
    """fused in bfloat16; the reference in float32 and in bfloat16."""
    artifact = checkpoint.parent / request.param
    arguments = ["--source", str(checkpoint), "-o", str(artifact), "--device", "cuda", "--set", "voices=[]"]
    assert run(["quantize", request.param, *arguments]) == 0
    opened, device = open_artifact(artifact), torch.device("cuda")
    plain = [TorchEngine(opened, "reference", device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    return cosyq.load(artifact, device="cuda", engine="fused").engine, *plain


@pytest.fixture
def voice(checkpoint, engines):
    return load_voice(checkpoint / "voice.safetensors", engines[0].config.flow)


def prompt(engine, voice, length: int) -> torch.Tensor:
    c = engine.config.llm
    speech = voice.prompt_tokens.tolist()
    return torch.cat([engine.embed([], [c.sos]), engine.embed(TEXT[:length], [c.task_id, *speech])]).unsqueeze(0)


def first_logits(engine, embeddings) -> torch.Tensor:
    decoder = engine.decoder(1, positions=400, room=ROOM)
    row = decoder.join(embeddings, minimum=ROOM, maximum=ROOM, generator=torch.Generator().manual_seed(1))
    decoder.prefill()
    torch.cuda.synchronize()
    logits = decoder.logits[row].float().clone()
    decoder.leave(row)
    return logits


def ids(decoder: BatchDecoder, embeddings: list[torch.Tensor]) -> list[list[int]]:
    """What each row draws with a seed of its own."""
    rows = {}
    for seed, shown in enumerate(embeddings):
        rows[decoder.join(shown, minimum=ROOM, maximum=ROOM, generator=torch.Generator().manual_seed(seed))] = seed
    said: list[list[int]] = [[] for _ in embeddings]
    while any(len(tokens) < ROOM for tokens in said):
        decoder.step()
        for row, news in decoder.news().items():
            assert news.error is None
            said[rows[row]] += news.tokens
    return said


def test_logits_of_a_prompt(engines, voice):
    fused, exact, plain = engines
    for length in (1, 20, 40):
        found, wanted, rounded = (first_logits(e, prompt(e, voice, length)) for e in (fused, exact, plain))
        assert relative(found, wanted) < 1.5 * relative(rounded, wanted) + 1e-3


def logits_of_rows(engine, shown: list[torch.Tensor]) -> torch.Tensor:
    """Behind prompts side by side, and behind two more ids of each, the same in every engine: [3, rows, n]."""
    decoder = engine.decoder(len(shown), positions=400, room=ROOM)
    for prompt_of_row in shown:
        decoder.join(prompt_of_row, minimum=ROOM, maximum=ROOM, generator=torch.Generator().manual_seed(1))
    decoder.prefill()
    torch.cuda.synchronize()
    found = [decoder.logits[: len(shown)].float().clone()]
    device, positions = decoder.logits.device, decoder.positions[: len(shown)].clone()
    for drawn in (7, 4000):
        ids = torch.full((len(shown),), drawn, device=device)
        for row in range(len(shown)):
            decoder.forward.reserve(row, int(positions[row]) + 1)
        found.append(decoder.forward(ids, positions, 400).float().clone())
        positions += 1
    return torch.stack(found)


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
def test_logits_of_rows_side_by_side(engines, voice, rows):
    """Ragged prompts; in every row what bfloat16 costs, and no more."""
    fused, exact, plain = engines
    shown = [prompt(exact, voice, 40 - 2 * row) for row in range(rows)]
    found, wanted, rounded = (logits_of_rows(e, shown) for e in (fused, exact, plain))
    for step in range(3):
        for row in range(rows):
            bound = 1.5 * relative(rounded[step, row], wanted[step, row]) + 1e-3
            assert relative(found[step, row], wanted[step, row]) < bound


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
def test_rows_say_the_same_again(engines, voice, rows):
    fused, exact, _ = engines
    shown = [prompt(exact, voice, 40 - 2 * row) for row in range(rows)]
    found = ids(fused.decoder(rows, positions=400, room=ROOM), shown)
    assert found == ids(fused.decoder(rows, positions=400, room=ROOM), shown)
    assert all(len(tokens) == ROOM for tokens in found)


def test_mel_and_samples(engines, voice):
    fused, exact, _ = engines
    tokens = list(range(0, 6000, 100))
    for streaming in (False, True):
        mels = [e.mel(tokens, voice, streaming=streaming, final=True, steps=10) for e in engines]
        assert relative(mels[0], mels[1]) < 1.5 * relative(mels[2], mels[1]) + 1e-3
    samples = [e.samples(mels[1], StreamState(), final=True) for e in (fused, exact)]
    assert relative(*samples) < 0.01


def test_a_seed_fixes_the_audio_and_a_stream_has_no_clicks(engines, voice):
    fused = engines[0]
    part = Part((([], [fused.config.llm.sos]), (TEXT, [fused.config.llm.task_id])), ROOM, ROOM)
    drawn = [
        list(fused.speech_tokens([part], positions=100, room=ROOM, generator=torch.Generator().manual_seed(3)))
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1]
    mel = fused.mel(drawn[0], voice, streaming=True, final=True, steps=10)
    whole, state = fused.samples(mel, StreamState(), final=True), StreamState()
    pieces = [fused.samples(piece, state, final=False) for piece in mel.split(37, dim=1)]
    pieces.append(fused.samples(mel[:, :0], state, final=True))
    assert torch.equal(torch.cat(pieces), whole)


def test_five_minutes_in_bounded_memory(engines):
    """Vocoder only: the flow's fixed noise bounds an utterance."""
    fused = engines[0]
    mel, state = torch.randn(80, 5000, device="cuda"), StreamState()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        assert torch.isfinite(fused.samples(mel, state, final=False)).all()
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20


def test_made_ready_for_many_it_says_the_same(engines, voice):
    """Its weights are unpacked once and for all. Last but one: it changes the engine."""
    fused = engines[0]
    chunk = Chunk(list(range(0, 3300, 100)), voice, True, False, 10)
    before = fused.mels([chunk])[0]
    fused.prepare(2 << 30)
    assert relative(fused.mels([chunk])[0], before) == 0


def test_a_voice_that_comes_again_costs_its_own_frames(engines, voice):
    """The third chunk goes on from what the second one kept."""
    fused, exact, plain = engines
    fused.prepare(2 << 30)
    chunk = Chunk(list(range(0, 3200, 100)), voice.ending(74), True, False, 10)  # not asked for before
    wanted, rounded = (e.mels([chunk])[0] for e in (exact, plain))
    bound = 1.5 * relative(rounded, wanted) + 1e-3
    frames = [fused.frames(chunk)]
    for _ in range(3):
        assert relative(fused.mels([chunk])[0], wanted) < bound
        frames.append(fused.frames(chunk))
    assert [before - frames[0] for before in frames] == [0, 0, -100, -100]


def test_memory_that_an_utterance_held_comes_back(engines, voice):
    """For the next one, at its last chunk or when it is given up, though what was launched still reads it."""
    fused = engines[0]
    fused.prepare(2 << 30)
    mels, held = [], []
    for _ in range(3):  # the prompt is kept from the second time on
        found = []
        for chunks in (2, 4):
            rendering = Rendering(fused, voice, steps=10, speed=1.0)
            rendering.add(range(0, 6000, 40))
            rendering.end()
            for _ in range(chunks):
                chunk = rendering.chunk
                found += fused.mels([chunk])
                rendering.take(found[-1])
                assert rendering.over or chunk.state.frames == 2 * (chunk.ids.numel() - 3)
            rendering.forget()
            assert not chunk.state.segments
        mels.append(torch.cat(found, dim=1))
        held.append(torch.cuda.memory_allocated())
    assert held[2] - held[1] < 2**20
    assert torch.equal(mels[1], mels[2])
