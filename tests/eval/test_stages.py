"""Two artifacts at the same work: exact zeros where they are one, more where the weights are further off."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import relative

from cosyq.artifact.reader import open_artifact, text_rows
from cosyq.errors import DeviceError
from cosyq.eval import metrics, stages
from cosyq.eval.run import listen
from cosyq.eval.stages import (
    Arithmetic,
    compare,
    flow_shares,
    llm_shares,
    mels,
    sound,
    sound_shares,
    steps_ahead,
)
from cosyq.model.llm import KVCache
from cosyq.runtime.decode import prefill, step
from cosyq.runtime.request import Requests
from cosyq.runtime.synthesizer import load
from cosyq.sequences import Spoken, artifact_voices, shown

TEXTS = ("hello world", "the quick brown fox", "one two three")
MINI_FP32 = (
    "source.path=null",
    "voices=[{name: default, bundled: clara}]",
    "stages.llm.weights=fp32",
    "stages.flow.weights=fp32",
)
CPU = Arithmetic(torch.device("cpu"))
LEVELS = (0.02, 0.08, 0.3)  # of noise, beside a weight's own RMS


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def heard_of(voice):
    """Three utterances for the golden checkpoint, of ids drawn evenly: by itself it would speak without end."""

    def get(artifact):
        random, vocabulary = torch.Generator().manual_seed(0), artifact.manifest.model.llm.speech_vocab
        spoken = [
            Spoken(text, voice.name, 0, tuple(torch.randint(vocabulary, (20,), generator=random).tolist()), finish)
            for text, finish in zip(TEXTS, ("stop", "length", "stop"), strict=True)
        ]
        return shown(Requests(artifact), spoken, [voice])

    return get


def by_key(series):
    return {item.metric.key: item for item in series}


def test_the_steps_are_those_of_speaking(artifact_of, heard_of):
    """One pass over all of an utterance gives what a token a step gives, from the prompt's last position on."""
    artifact = open_artifact(artifact_of("int8"))
    heard, tts = heard_of(artifact), load(artifact, device="cpu", dtype="fp32", engine="unpacked")
    for item, found in zip(heard, steps_ahead(CPU.load(artifact, "llm"), text_rows(artifact), heard), strict=True):
        tokens, stops = item.spoken.tokens, item.spoken.finish == "stop"
        config = artifact.manifest.model.llm
        cache = KVCache.empty(config, item.part.positions + 20, device=CPU.device, dtype=torch.float32)
        shown = torch.cat([tts.engine.embed(text, speech) for text, speech in item.part.shown])[None]
        expected = [prefill(tts.engine.llm, shown, cache)]
        expected += [step(tts.engine.llm, token, cache) for token in tokens[: None if stops else -1]]
        assert len(found) == len(tokens) + stops
        assert relative(found, torch.stack(expected)) < 1e-4


def test_mel_and_sound_are_those_of_speaking(artifact_of, heard_of, voice):
    artifact = open_artifact(artifact_of("int8"))
    heard, tts = heard_of(artifact), load(artifact, device="cpu", dtype="fp32", engine="unpacked")
    mel = next(mels(CPU.load(artifact, "flow"), heard))
    whole = tts.convert(list(heard[0].audible), voice=voice)
    assert np.array_equal(sound(CPU.load(artifact, "vocoder"), mel).numpy(), whole.samples)


def test_an_artifact_is_at_exactly_nothing_from_itself(artifact_of, heard_of):
    artifact = open_artifact(artifact_of("nf4"))
    series, compared = compare(artifact, artifact, heard_of(artifact), CPU, quiet)
    found = by_key(series)
    assert found.keys() == {metric.key for metric in metrics.EXACT}
    for key, item in found.items():
        if item.reference is not None:
            assert np.array_equal(item.artifact, item.reference), key
        else:
            assert not item.artifact.any(), key
    for item in compared:
        assert np.array_equal(item.artifact.samples, item.reference.samples)


def test_every_metric_sees_what_was_packed(artifact_of, heard_of):
    """Long utterances count for more; a true end is asked for where there was one."""
    reference = open_artifact(artifact_of("fp32"))
    heard = heard_of(reference)
    said = []
    series, compared = compare(
        open_artifact(artifact_of("nf4")),
        reference,
        heard,
        CPU,
        lambda what, done, total: said.append((what, done, total)),
    )
    found = by_key(series)
    assert said == [(what, i, 3) for what in ("language model", "flow", "vocoder") for i in range(3)]
    for key, item in found.items():
        assert np.abs(item.artifact - (0 if item.reference is None else item.reference)).min() > 0, key
    assert found["llm.kl"].artifact_weights.tolist() == [21, 20, 21]
    assert found["llm.stop"].artifact_weights.tolist() == [1, 1]
    assert found["flow.lsd"].artifact_weights.tolist() == [2 * len(item.audible) for item in heard]
    for index, item in enumerate(compared):
        assert item.text == heard[index].spoken.text
        for key in ("llm.nll", "flow.mcd", "chain.stft"):
            series = found[key]
            assert item.artifact.values[key] == series.artifact[index] / series.artifact_weights[index]
        assert item.reference.values.keys() == {"llm.top1", "llm.nll"} | (
            {"llm.stop"} if heard[index].spoken.finish == "stop" else set()
        )
        assert len(item.artifact.samples) == len(item.reference.samples) == 960 * len(heard[index].audible)


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        ("stages.llm.weights=nf4", {"llm.kl", "llm.nll", "llm.stop"}),
        ("stages.flow.weights=nf4", {"flow.lsd", "flow.mcd", "chain.lsd", "chain.stft"}),
        ("stages.vocoder.weights=bf16", {"vocoder.stft", "chain.lsd", "chain.stft"}),
    ],
)
def test_a_stage_is_measured_by_itself(artifact_of, heard_of, change, moved):
    reference = open_artifact(artifact_of("fp32"))
    series, _ = compare(open_artifact(artifact_of("fp32", change)), reference, heard_of(reference)[:1], CPU, quiet)
    lost = {
        item.metric.key: float(item.artifact[0] - (item.reference[0] if item.reference is not None else 0))
        for item in series
    }
    lost["llm.top1"] = 0.0  # in a few steps it may hold
    assert {key for key, total in lost.items() if total} == moved
    if "vocoder.stft" in moved:
        assert lost["chain.stft"] == lost["vocoder.stft"]


def test_only_the_worst_keep_their_sound(artifact_of, heard_of, monkeypatch):
    monkeypatch.setattr(stages, "SOUNDS", 1)
    reference = open_artifact(artifact_of("fp32"))
    _, compared = compare(open_artifact(artifact_of("nf4")), reference, heard_of(reference), CPU, quiet)
    distances = [item.artifact.values["chain.lsd"] for item in compared]
    kept = [item.artifact.samples is not None and item.reference.samples is not None for item in compared]
    assert kept == [distance == max(distances) for distance in distances]


def shaken(network, level):
    """Its weights, each with noise of `level` beside its own RMS."""
    other, random = copy.deepcopy(network), torch.Generator().manual_seed(1)
    for weight in other.parameters():
        noise = torch.randn(weight.shape, generator=random)
        weight.data += (level * weight.float().square().mean().sqrt() * noise).to(weight.dtype)
    return other


def test_every_metric_grows_with_noise_on_the_weights(artifact_of, tmp_path):
    """Of cosyq-mini: a pitch that random weights make is noise already, and cannot get worse."""
    artifact = open_artifact(artifact_of("mini", *MINI_FP32))
    texts, voices = ["Is this your coat?"], artifact_voices(artifact, 1)
    heard = listen(artifact, artifact, texts, voices, seed=0, arithmetic=CPU, file=tmp_path / "s.json", progress=quiet)
    rows = text_rows(artifact)
    llm, flow, vocoder = (CPU.load(artifact, stage) for stage in ("llm", "flow", "vocoder"))
    vocabulary = artifact.manifest.model.llm.speech_vocab
    logits, frames = list(steps_ahead(llm, rows, heard)), list(mels(flow, heard))
    sounds = [sound(vocoder, mel) for mel in frames]
    moved = {metric.key: [] for metric in metrics.EXACT}
    for level in LEVELS:
        other_llm, other_flow, other_vocoder = (shaken(network, level) for network in (llm, flow, vocoder))
        totals = dict.fromkeys(moved, 0.0)
        others = zip(steps_ahead(other_llm, rows, heard), mels(other_flow, heard), strict=True)
        for item, right, mel, samples, (ids, other) in zip(heard, logits, frames, sounds, others, strict=True):
            shares = [
                *llm_shares(item, vocabulary, ids, right),
                *flow_shares(other, mel),
                *sound_shares(mel.shape[1], sound(other_vocoder, mel), sound(other_vocoder, other), samples),
            ]
            for share in shares:
                totals[share.metric.key] += share.artifact - (share.reference or 0)
        for key, total in totals.items():
            moved[key].append(abs(total))
    for key, values in moved.items():
        assert values == sorted(set(values)), f"{key}: {values}"


def test_what_is_not_finite_is_said(artifact_of, heard_of):
    artifact = open_artifact(artifact_of("fp32"))
    heard = heard_of(artifact)
    llm, flow = (CPU.load(artifact, stage) for stage in ("llm", "flow"))
    llm.norm.weight.data[0] = torch.nan
    flow.adaln["10"].data[:] = torch.nan
    with pytest.raises(DeviceError, match="logits are not finite"):
        next(steps_ahead(llm, text_rows(artifact), heard))
    with pytest.raises(DeviceError, match="mel is not finite"):
        next(mels(flow, heard))


def test_the_steps_of_the_flow_are_those_asked_for(artifact_of, heard_of):
    artifact = open_artifact(artifact_of("fp32", "stages.flow.steps=[4,10]"))
    (item, *_), flow = heard_of(artifact), CPU.load(artifact, "flow")
    four = next(mels(flow, [item]))
    ten = next(mels(flow, [replace(item, manner=replace(item.manner, steps=10))]))
    assert item.manner.steps == 4
    assert float((four - ten).abs().max()) > 0
