"""cosyq-mini, quantized here, is understood by a recognizer; what a broken build would say is not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch
from pocketsphinx import Decoder

import cosyq
from cosyq import build
from cosyq.audio.recording import Recording
from cosyq.model.vocoder import StreamState
from cosyq.random_model import SMALL, write_random
from cosyq.recipe import bundled_checkpoint, find_recipe, load_recipe
from cosyq.voices.enrol import Encoders, enrol

SENTENCES = (
    "Hello there, how are you today?",
    "Thank you very much.",
    "Could you please turn down the music a little?",
    "My grandmother used to bake bread every Saturday.",
    "Turn right at the second traffic light.",
)
UNDERSTOOD = 0.25  # of the words are wrong, at most
CONVERTED = 0.5  # the same, of a sentence that was heard and said again
NOISE = 0.8  # of the words are wrong, at least


def quantized(output: Path, *changes: str) -> Path:
    path = find_recipe("mini")
    prepared = build.prepare(load_recipe(path, list(changes)), path.read_text("utf-8"))
    build.run(prepared, output, torch.device("cpu"), force=False, progress=lambda *_: None)
    return output


def heard(samples: np.ndarray, decoder) -> list[str]:
    low = soxr.resample(samples, 24_000, 16_000)
    decoder.start_utt()
    decoder.process_raw((low * 32767).clip(-32768, 32767).astype("<i2").tobytes(), no_search=False, full_utt=True)
    decoder.end_utt()
    best = decoder.hyp()
    return best.hypstr.split() if best else []


def edits(found: list[str], wanted: list[str]) -> int:
    row = list(range(len(found) + 1))
    for i, word in enumerate(wanted, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(found, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def word_error_rate(folder: Path, sentences=SENTENCES) -> float:
    tts = cosyq.load(folder, device="cpu")
    return error_rate((sentence, tts.synthesize(sentence, seed=0).samples) for sentence in sentences)


def error_rate(spoken: Iterable[tuple[str, np.ndarray]]) -> float:
    decoder = Decoder(samprate=16_000, loglevel="FATAL")
    errors = words = 0
    for sentence, samples in spoken:
        wanted = "".join(c for c in sentence.lower() if c.isalpha() or c == " ").split()
        found = heard(samples, decoder)
        print(sentence, "|", " ".join(found))
        errors, words = errors + edits(found, wanted), words + len(wanted)
    return errors / words


def test_a_recognizer_understands_it(mini_artifact):
    assert word_error_rate(mini_artifact) < UNDERSTOOD


def test_every_sentence_of_a_text_is_said(mini_artifact):
    """It learnt of single sentences, and would end after the first."""
    assert word_error_rate(mini_artifact, [f"{SENTENCES[0]} {SENTENCES[1]}"]) < UNDERSTOOD


@pytest.mark.parametrize("stage", ["llm", "flow"])
def test_rows_that_lie_one_too_far_are_not_understood(tmp_path, monkeypatch, stage):
    """A mistake in packing that every check of names, shapes and hashes would let through."""
    right = build.pack

    def wrong(weight, fmt, device):
        packed, error = right(weight, fmt, device)
        return {name: t.roll(1, 0) if t.dtype == torch.int8 else t for name, t in packed.items()}, error

    monkeypatch.setattr(build, "pack", wrong)
    other = "flow" if stage == "llm" else "llm"
    damaged = quantized(tmp_path / "damaged", f"stages.{other}.weights=bf16")
    assert word_error_rate(damaged, SENTENCES[1:2]) > NOISE


def test_random_weights_are_not_understood(tmp_path):
    write_random(tmp_path / "random", SMALL, seed=0)
    changes = ("source.bundled=null", f"source.path={tmp_path / 'random'}", "voices=[]")
    assert word_error_rate(quantized(tmp_path / "noise", *changes), SENTENCES[1:2]) > NOISE


def test_another_voice_is_another_speaker(mini_artifact):
    """The voices that are heard in the speech are the ones that were asked for, in timbre and in pitch."""
    tts, encoders = (
        cosyq.load(mini_artifact, device="cpu", dtype="fp32", engine="unpacked"),
        Encoders(bundled_checkpoint("mini")),
    )
    flow = tts.engine.config.flow
    vectors, pitches = {}, {}
    for name in ("default", "magnus", "pip"):
        samples = tts.synthesize(SENTENCES[2], voice=name, seed=0).samples
        spoken = enrol("spoken", Recording(samples, 24_000), "", encoders, flow)
        vectors[name] = torch.nn.functional.normalize(spoken.speaker, dim=-1)
        f0 = tts.engine.vocoder.f0_predictor.run(spoken.prompt_mel.T[None], StreamState())
        pitches[name] = float(f0[f0 > 60].median())
    wanted = {name: torch.nn.functional.normalize(tts.voice(name).speaker, dim=-1) for name in vectors}
    for name, vector in vectors.items():
        assert max(wanted, key=lambda other: float(vector @ wanted[other])) == name
    assert float(vectors["magnus"] @ vectors["pip"]) < 0.5
    assert pitches["magnus"] < 0.9 * pitches["default"] < 0.8 * pitches["pip"]


def test_a_conversion_keeps_the_words_and_takes_the_voice(mini_artifact):
    tts, encoders = (
        cosyq.load(mini_artifact, device="cpu", dtype="fp32", engine="unpacked"),
        Encoders(bundled_checkpoint("mini")),
    )
    said = tts.synthesize(SENTENCES[3], seed=0).samples
    tokens = encoders.speech_tokens(torch.from_numpy(Recording(said, 24_000).at(16_000))).tolist()
    converted = tts.convert(tokens, voice="magnus").samples
    assert len(converted) == pytest.approx(len(said), abs=960)
    assert error_rate([(SENTENCES[3], converted)]) < CONVERTED
    vector = encoders.speaker(torch.from_numpy(Recording(converted, 24_000).at(16_000)))
    similarity = {name: float(torch.cosine_similarity(vector, tts.voice(name).speaker, 0)) for name in tts.voices()}
    assert max(similarity, key=lambda name: similarity[name]) == "magnus"
