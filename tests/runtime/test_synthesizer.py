import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import relative

import cosyq
from cosyq.errors import ArtifactError, DeviceError, UsageError
from cosyq.model.vocoder import StreamState
from cosyq.quantize.linear import PackedLinear
from cosyq.runtime import request
from cosyq.runtime.decode import Silence
from cosyq.runtime.engine import pick_device
from cosyq.runtime.request import NEUTRAL
from cosyq.runtime.schedule import shown_prompt
from cosyq.voices.voice import Voice, load_voice

TEXT = "hello world, the quick brown fox"


@pytest.fixture(scope="module")
def tts(artifact_of):
    return cosyq.load(artifact_of("int8"), device="cpu", dtype="fp32")


def test_a_seed_fixes_the_audio(tts, voice):
    first, second = (tts.synthesize(TEXT, voice=voice, seed=7) for _ in range(2))
    assert np.array_equal(first.samples, second.samples)
    assert not np.array_equal(first.samples, tts.synthesize(TEXT, voice=voice, seed=8).samples)
    assert len(first.samples) == 960 * first.timings.speech_tokens
    assert first.sample_rate == 24000


def test_a_seed_fixes_the_audio_in_another_process(tts, artifact_of):
    here = tts.synthesize(TEXT, seed=7).samples
    code = (
        "import cosyq, sys;"
        f"a = cosyq.load({str(artifact_of('int8'))!r}, device='cpu', dtype='fp32').synthesize({TEXT!r}, seed=7);"
        "sys.stdout.buffer.write(a.samples.tobytes())"
    )
    there = np.frombuffer(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout, "<f4")
    assert np.array_equal(here, there)


def test_requests_leave_nothing_behind(tts, voice):
    alone = tts.synthesize(TEXT, voice=voice, seed=7).samples
    abandoned = tts.stream(TEXT, voice=voice, seed=3)
    next(abandoned)
    abandoned.close()
    assert np.array_equal(alone, tts.synthesize(TEXT, voice=voice, seed=7).samples)


@pytest.mark.parametrize("prompt", [0, 7, 16, 25])
def test_a_stream_equals_one_block_causal_pass(tts, voice, prompt):
    """Whatever the prompt leaves of its last block, the chunks join to what one pass over its end renders."""
    cut = Voice("cut", voice.speaker, voice.prompt_tokens[:prompt], voice.prompt_mel[: 2 * prompt], "hello there")
    chunks = list(tts.stream(TEXT, voice=cut, seed=5))
    assert len(chunks) > 1
    tokens = _tokens(tts, cut, seed=5)
    flow = tts.engine.config.flow
    shown = cut.ending(shown_prompt(prompt, flow.chunk_frames // flow.token_mel_ratio))
    assert len(shown.prompt_mel) == 2 * shown.prompt_tokens.numel()
    mel = tts.engine.mel(tokens, shown, streaming=True, final=True, steps=10)
    whole = tts.engine.samples(mel, StreamState(), final=True)
    streamed = torch.from_numpy(np.concatenate([chunk.samples for chunk in chunks]))
    # A chunk's flow runs over fewer frames, so float32 sums differ in order; ten steps and the phase amplify it.
    assert relative(streamed, whole) < 2e-3


def test_the_rest_of_an_utterance_can_be_one_chunk(tts, voice):
    """Once all its ids were drawn, behind the first chunk, and if the flow is to take so many frames."""
    manner, tokens = tts.requests.manner({"voice": voice, "seed": 5}), _tokens(tts, voice, seed=5)

    def render(frames):
        rendering = tts.rendering(manner)
        rendering.add(tokens)
        chunks = [rendering.next()]
        rendering.stretch(frames)
        assert rendering.due < len(tokens)  # more may follow
        rendering.end()
        while not rendering.over:
            rendering.stretch(frames)
            chunks.append(rendering.next())
        return chunks

    whole = 2 * (len(tokens) + voice.prompt_tokens.numel())
    short, long = render(0), render(whole)
    assert (len(short) > 2, len(long)) == (True, 2)
    both = [torch.from_numpy(np.concatenate(chunks)) for chunks in (short, long)]
    assert len(both[0]) == len(both[1])
    assert relative(both[1], both[0]) < 2e-3


def _tokens(tts, voice, seed):
    manner = tts.requests.manner({"voice": voice, "seed": seed})
    (utterance,) = tts.requests.utterances(TEXT, manner)
    drawn = tts._speech(utterance, manner.generator(0), tts.clock(manner))
    return list(filter(Silence(tts.engine.config.llm.silent_tokens).lets_through, drawn))


def test_the_minimum_length_is_enforced(tts):
    for seed in range(8):
        timings = tts.synthesize(TEXT, seed=seed).timings
        assert 2 * timings.text_tokens <= timings.speech_tokens <= 20 * timings.text_tokens
        assert timings.finish == ("length" if timings.speech_tokens == 20 * timings.text_tokens else "stop")


def test_the_timings_add_up(tts):
    *_, last = tts.stream(TEXT, seed=1)
    t = last.timings
    assert 0 < t.first_audio_seconds <= t.total_seconds
    assert t.real_time_factor == pytest.approx(t.total_seconds / t.audio_seconds)
    assert t.finish == "stop"


def test_voices(tts, tmp_path, voice):
    assert tts.voices() == [NEUTRAL]
    assert tts.voice().prompt_tokens.numel() == 0
    path = tmp_path / "me.safetensors"
    path.write_bytes(voice.to_bytes())
    assert tts.voice(str(path)).transcript == voice.transcript
    with pytest.raises(UsageError, match=r"unknown voice.*the artifact has: neutral"):
        tts.voice("nobody")
    with pytest.raises(ArtifactError, match="no such voice file"):
        tts.voice("nowhere.safetensors")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match="not a readable voice"):
        tts.voice(str(path))


def test_a_speaker_vector_alone_is_a_voice(tts):
    one, other = (Voice.from_speaker("v", torch.randn(192, generator=torch.Generator().manual_seed(s))) for s in (1, 2))
    a, b = tts.synthesize(TEXT, voice=one, seed=1), tts.synthesize(TEXT, voice=other, seed=1)
    assert len(a.samples) == len(b.samples)  # the language model never sees it
    assert not np.array_equal(a.samples, b.samples)


def test_a_voice_of_another_model_is_refused(tts):
    with pytest.raises(ArtifactError, match=r"speaker is torch.float32 \[64\], expected torch.float32 \[192\]"):
        tts.synthesize(TEXT, voice=Voice.from_speaker("v", torch.zeros(64)))


def test_numbers_are_checked(tts):
    with pytest.raises(UsageError, match="no table for so many flow steps"):
        tts.stream(TEXT, steps=7)  # before the first chunk is asked for
    with pytest.raises(TypeError, match="unknown options: sead"):
        tts.synthesize(TEXT, sead=3)
    with pytest.raises(UsageError, match="a seed is a number"):
        tts.synthesize(TEXT, seed=-1)


def test_devices():
    with pytest.raises(DeviceError, match="no such kind of device"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="CUDA is not available"):
            pick_device("cuda")


@pytest.mark.parametrize("recipe", ["int8", "nf4", "bf16", "hybrid"])
def test_engines_agree_within_their_arithmetic(artifact_of, voice, recipe):
    """The same tokens and noise through both engines.

    4-bit and float weights are multiplied by the same activations: only the order of sums differs. LLM.int8()
    rounds activations to eight bits per row as well, 0.4 % of their absmax, which ten Euler steps then feed on.
    """
    tokens = list(range(100, 140))
    mels = [
        cosyq.load(artifact_of(recipe), device="cpu", engine=name).engine.mel(
            tokens, voice, streaming=False, final=True, steps=10
        )
        for name in ("reference", "bnb")
    ]
    bound = 0.05 if recipe == "int8" else 1e-4
    assert relative(mels[1], mels[0]) < bound
    spoken = cosyq.load(artifact_of(recipe), device="cpu", engine="bnb").synthesize(TEXT, voice=voice, seed=1)
    assert spoken.timings.finish == "stop"
    if recipe == "int8":
        assert not torch.equal(*mels)  # two engines indeed


@pytest.mark.parametrize("recipe", ["int8", "nf4", "hybrid"])
def test_unpacked_weights_give_the_same_samples(artifact_of, voice, recipe):
    packed, unpacked = (
        cosyq.load(artifact_of(recipe), device="cpu", dtype="fp32", engine=name) for name in ("reference", "unpacked")
    )
    samples = [tts.synthesize(TEXT, voice=voice, seed=1).samples for tts in (packed, unpacked)]
    np.testing.assert_array_equal(*samples)
    layers = [tts.engine.llm.get_submodule("layers.0.mlp.down_proj") for tts in (packed, unpacked)]
    assert isinstance(layers[0], PackedLinear)
    assert layers[1].weight.dtype == torch.float32
    assert cosyq.load(artifact_of(recipe), device="cpu").engine.name == "cpu"


def test_a_rule_may_pack_the_speakers_projection(artifact_of, tts, voice):
    packed = cosyq.load(
        artifact_of("int8", "rules=[{match: flow.speaker_proj, weights: int8}]"), device="cpu", engine="reference"
    )
    assert isinstance(packed.engine.flow.speaker_proj, PackedLinear)
    tokens = list(range(100, 120))
    mels = [t.engine.mel(tokens, voice, streaming=False, final=True, steps=10) for t in (packed, tts)]
    assert 0 < relative(*mels) < 0.05


def test_speed_changes_the_length_and_streams_alike(tts, voice):
    normal = tts.synthesize(TEXT, voice=voice, seed=2)
    for speed in (0.5, 1.5, 2.0):
        audio = tts.synthesize(TEXT, voice=voice, seed=2, speed=speed)
        assert len(audio.samples) == pytest.approx(len(normal.samples) / speed, abs=480)
        streamed = sum(len(chunk.samples) for chunk in tts.stream(TEXT, voice=voice, seed=2, speed=speed))
        assert streamed == len(audio.samples)
    with pytest.raises(UsageError, match=r"from 0\.5 to 2\.0"):
        tts.synthesize(TEXT, speed=3)


def test_modes_decide_what_the_language_model_sees(tts, voice):
    def seen(**options):
        (utterance,) = tts.requests.utterances(TEXT, tts.requests.manner({"voice": voice, **options}))
        sos, (words, spoken) = utterance.part.shown
        assert sos == ([], [tts.engine.config.llm.sos])
        assert spoken[0] == tts.engine.config.llm.task_id
        return words, spoken[1:]

    encode = tts.requests._tokenizer.encode
    text, speech = seen()
    assert text == encode("You are a helpful assistant.<|endofprompt|>hello there") + encode(TEXT)
    assert speech == voice.prompt_tokens.tolist()
    assert seen(cross_lingual=True) == (encode("You are a helpful assistant.<|endofprompt|>") + encode(TEXT), [])
    slowly = encode("You are a helpful assistant. speak slowly<|endofprompt|>") + encode(TEXT)
    assert seen(instruct="speak slowly") == (slowly, [])
    for bad in ({"instruct": "x<|endofprompt|>"}, {"instruct": "..."}):
        with pytest.raises(UsageError):
            seen(**bad)


def test_conversion_says_the_same_tokens_in_another_voice(tts, voice):
    tokens = list(range(500, 540))
    one, other = tts.convert(tokens, voice=voice), tts.convert(tokens)
    assert len(one.samples) == len(other.samples) == 40 * 960
    assert not np.array_equal(one.samples, other.samples)
    for count in (0, 10_000):
        with pytest.raises(UsageError, match="cannot be converted"):
            tts.convert([1] * count, voice=voice)


LONG = "hello world. the quick brown fox. " * 2 + "\n\nanother paragraph."


def test_long_text_is_spoken_utterance_by_utterance(tts, voice, monkeypatch):
    monkeypatch.setattr("cosyq.text.split.split_text.__defaults__", (30,))  # tokens of an utterance, for less to say
    manner = tts.requests.manner({"voice": voice, "seed": 4})
    utterances = tts.requests.utterances(LONG, manner)
    assert len(utterances) > 2
    assert [manner.generator(i).initial_seed() for i in range(3)] == [4, 5, 6]
    assert [bool(u.pause) for u in utterances].count(True) == 1
    assert not utterances[-1].pause
    parts = list(tts.utterances(LONG, voice=voice, seed=4))
    assert len(parts) == len(utterances)
    whole = tts.synthesize(LONG, voice=voice, seed=4)
    assert np.array_equal(whole.samples, np.concatenate([p.samples for p in parts]))
    assert whole.seed == 4
    assert {part.seed for part in parts} == {4}  # the request's, which gives the same audio again
    assert whole.timings.audio_seconds == pytest.approx(len(whole.samples) / 24000)
    assert whole.timings.text_tokens == sum(u.words for u in utterances)
    # Each is what it would be alone, with the seed it got.
    (alone,) = tts._utterances(utterances[:1], manner)
    assert np.array_equal(alone.samples, parts[0].samples)
    streamed = list(tts.stream(LONG, voice=voice, seed=4))
    assert sum(len(c.samples) for c in streamed) == len(whole.samples)
    assert {chunk.seed for chunk in streamed} == {4}
    assert streamed[-1].timings.audio_seconds == pytest.approx(len(whole.samples) / 24000)


def test_a_voice_is_read_once_until_its_file_changes(tts, voice, tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(request, "load_voice", lambda path, config: reads.append(path) or load_voice(path, config))
    path = tmp_path / "some.safetensors"
    path.write_bytes(voice.to_bytes())
    assert request.find_voice(tts.artifact, str(path)) is request.find_voice(tts.artifact, str(path))
    assert len(reads) == 1
    path.unlink()
    path.write_bytes(replace(voice, transcript="another").to_bytes())
    assert request.find_voice(tts.artifact, str(path)).transcript == "another"
    path.write_bytes(b"damaged")
    for _ in range(2):
        with pytest.raises(ArtifactError):
            request.find_voice(tts.artifact, str(path))
    path.unlink()
    with pytest.raises(ArtifactError, match="no such voice"):
        request.find_voice(tts.artifact, str(path))
