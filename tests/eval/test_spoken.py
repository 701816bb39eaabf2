"""Judges react to damage the right way, and two that are the same differ in nothing."""

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch
from conftest import MINI_SAYS

import cosyq
from cosyq.errors import UsageError
from cosyq.eval import metrics
from cosyq.eval.likeness import Likeness, direction, distance
from cosyq.eval.metric import judge
from cosyq.eval.recognizers import recognizer
from cosyq.eval.spoken import HELD, SOUNDS, Aloud, Judges, Mark, hear, speak_both
from cosyq.recipe import bundled_checkpoint
from cosyq.runtime.clock import Timings
from cosyq.voices.voice import Voice

RATE = 24_000


class Echo:
    """Hears what it is told to, in turns."""

    def __init__(self, *heard):
        self.name, self.languages, self._heard, self._turn = "echo", ("en",), heard, 0

    def __call__(self, samples, rate, language):
        self._turn += 1
        return self._heard[(self._turn - 1) % len(self._heard)]


class Tone:
    """Speaks a second of a tone, whose pitch its seed decides."""

    sample_rate = RATE

    def __init__(self, *failing):
        self._failing = failing

    def synthesize(self, text, *, voice, seed):
        samples = (0.1 * np.sin(np.arange(RATE) * (1 + seed) / 50)).astype(np.float32)
        timings = Timings(0, 0, 0, 1, 1, 1, 0, "length" if seed in self._failing else "stop")
        return cosyq.Audio(samples, RATE, seed, timings, text)


@pytest.fixture(scope="module")
def judges():
    return Judges(recognizer("pocketsphinx"), None, Likeness(bundled_checkpoint("mini")))


@pytest.fixture(scope="module")
def clean(mini, mini_speech, judges):
    return hear(MINI_SAYS, mini_speech, RATE, "stop", mini.voice(), judges)


def damaged(mini, samples, judges, finish="stop"):
    heard = hear(MINI_SAYS, samples.astype(np.float32), RATE, finish, mini.voice(), judges)
    return {key: mark.total / mark.weight for key, mark in heard.marks.items()}, heard


def test_clean_speech(clean):
    values = clean.rendition().values
    assert values["spoken.errors"] == values["spoken.truncated"] == values["spoken.runaway"] == 0
    assert values["spoken.clicks"] == 0
    assert values["spoken.similarity"] > 0.9
    assert values["spoken.duration"] == len(clean.samples) / RATE


def test_noise_costs_words_and_the_voice(mini, mini_speech, judges, clean):
    rng, level = np.random.default_rng(0), np.sqrt(np.square(mini_speech).mean())
    before = clean.rendition().values
    similarity = [before["spoken.similarity"]]
    for ratio in (0.1, 0.3, 1.0):
        listening = judges if ratio == 1 else replace(judges, recognizer=None)
        values, _ = damaged(mini, mini_speech + ratio * level * rng.standard_normal(len(mini_speech)), listening)
        similarity.append(values["spoken.similarity"])
    assert similarity == sorted(similarity, reverse=True)
    assert similarity[0] - similarity[-1] > 0.2
    assert values["spoken.errors"] > 50
    assert values["spoken.silence"] < before["spoken.silence"], "it fills the pauses"


def test_a_low_pass_costs_words_and_the_voice(mini, mini_speech, judges, clean):
    muffled = soxr.resample(soxr.resample(mini_speech, RATE, 1600), 1600, RATE)
    values, _ = damaged(mini, muffled, judges)
    assert values["spoken.errors"] > 25
    assert values["spoken.similarity"] < clean.rendition().values["spoken.similarity"] - 0.1


def test_an_end_that_is_cut_off_is_found(mini, mini_speech, judges, clean):
    values, heard = damaged(mini, mini_speech[: len(mini_speech) * 2 // 3], judges)
    assert values["spoken.truncated"] == 100, heard.understood
    assert values["spoken.duration"] < clean.rendition().values["spoken.duration"]


def test_a_runaway_a_click_and_a_pause_are_found(mini, mini_speech, judges, clean):
    middle = int(np.argmin(np.convolve(np.abs(mini_speech[RATE // 2 : -RATE // 2]), np.ones(200), "same"))) + RATE // 2
    spoilt = np.concatenate([mini_speech[:middle], np.zeros(RATE, np.float32), mini_speech[middle:]])
    spoilt[middle + RATE // 2] = 0.5
    values, heard = damaged(mini, spoilt, Judges(), finish="length")
    assert values["spoken.runaway"] == 100
    assert values["spoken.clicks"] == pytest.approx(60 / (len(spoilt) / RATE))
    silent, before = (judged.marks["spoken.silence"].total / 100 for judged in (heard, clean))
    assert silent - before == pytest.approx(1, abs=0.03)


def test_nothing_said_is_all_errors(mini, judges):
    values = hear(MINI_SAYS, np.zeros(0, np.float32), RATE, "stop", mini.voice(), judges).rendition().values
    assert (values["spoken.errors"], values["spoken.truncated"], values["spoken.duration"]) == (100, 100, 0)
    assert values.keys() & {"spoken.similarity", "spoken.clicks", "spoken.silence"} == set()


@pytest.mark.skipif(find_spec("distillmos") is None, reason="distillmos is not installed")
def test_the_opinion_falls_with_noise(mini_speech):
    from cosyq.eval.opinion import Opinion

    opinion, rng = Opinion(), np.random.default_rng(0)
    noisy = [mini_speech + scale * rng.standard_normal(len(mini_speech)).astype(np.float32) for scale in (0.003, 0.03)]
    scores = [opinion(samples, RATE) for samples in (mini_speech, *noisy)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] - scores[-1] > 0.3
    assert opinion(mini_speech[:100], RATE) is None


def test_an_artifact_against_itself_differs_in_nothing(mini):
    judges = Judges(Echo("thank you very munch"), None, Likeness(bundled_checkpoint("mini")))
    texts, voices = ["Thank you very much.", "Thank you."], [mini.voice("default"), mini.voice("pip")]
    said = []
    series, compared = speak_both(
        lambda: mini, lambda: mini, Aloud(texts, voices, judges), seed=3, progress=lambda *step: said.append(step)
    )
    findings = {found.metric: found for found in map(judge, series)}
    assert list(findings) == [metric for metric in metrics.SPOKEN if metric is not metrics.MOS]
    for found in findings.values():
        assert (found.difference.value, found.difference.low, found.difference.high) == (0, 0, 0), found.metric.key
    assert findings[metrics.ERRORS].artifact.value == pytest.approx(100 * 3 / 6), "1 of 4 words and 2 of 2"
    assert [(item.voice, item.seed) for item in compared] == [("clara", 3), ("pip", 4)]
    assert (compared[0].artifact.samples == compared[0].reference.samples).all()
    assert compared[0].artifact.understood == "thank you very munch"
    assert len(said) == 2 * 3, "a step a text, on either side"


def test_series_are_of_what_both_sides_tell():
    texts = ["One two three four.", "!", "Five six."]
    judges = Judges(Echo("one two three four", "", "six"))
    series, compared = speak_both(
        lambda: Tone(1), Tone, Aloud(texts, [_voice()], judges), seed=0, progress=lambda *_: None
    )
    found = {item.metric.key: item for item in series}
    assert found["spoken.errors"].artifact.tolist() == [0, 100]
    assert found["spoken.errors"].artifact_weights.tolist() == [4, 2], "a text without words has no say"
    assert found["spoken.runaway"].artifact.tolist() == [0, 100, 0]
    assert found["spoken.runaway"].reference.tolist() == [0, 0, 0]
    assert "spoken.similarity" not in found
    assert compared[1].artifact.finish == "length"


def _voice():
    return Voice.from_speaker("tone", torch.ones(4))


def test_only_the_worst_are_kept_to_be_heard():
    count = HELD + 10
    failing = {3, 100, HELD + 5}
    series, compared = speak_both(
        lambda: Tone(*failing), Tone, Aloud(["Hello."] * count, [_voice()], Judges()), seed=0, progress=lambda *_: None
    )
    kept = {index for index, item in enumerate(compared) if item.artifact.samples is not None}
    assert len(kept) == SOUNDS
    assert {3, 100} <= kept < set(range(HELD))
    assert all((item.artifact.samples is None) == (item.reference.samples is None) for item in compared)
    assert series[0].artifact.size == count


def test_a_language_that_a_recognizer_does_not_know_is_said_first():
    def loaded():
        raise AssertionError("nothing is loaded for it")

    with pytest.raises(UsageError, match="knows en and not zh"):
        speak_both(
            loaded, loaded, Aloud(["Hello.", "你好。"], [_voice()], Judges(Echo("x"))), seed=0, progress=lambda *_: None
        )


def test_directions():
    one = direction(np.array([3.0, 4.0], np.float32))
    assert one.tolist() == pytest.approx([0.6, 0.8])
    assert direction(np.zeros(4, np.float32)) is None
    assert distance(one, one) == 0.0
    assert distance(one, direction(np.array([4.0, -3.0], np.float32))) == pytest.approx(1.0)
    assert Mark(1).weight == 1


# ---- the command


def test_the_command(cli, mini_artifact, own_recognizer):
    code, out, err = cli(
        "eval", mini_artifact, "--against", mini_artifact, "--device", "cpu", "--limit", "2", "--json",
        "--recognizer", own_recognizer("'hello can you help me with this suitcase'"),
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert report["judges"] == {"recognizer": Path(sys.executable).name, "likeness": "campplus.onnx"}
    for key in ("llm.kl", "spoken.errors", "spoken.similarity", "spoken.timbre", "spoken.clicks"):
        assert report["findings"][key]["difference"]["value"] == 0
    assert report["findings"]["spoken.errors"]["artifact"]["value"] > 0
    assert "spoken.mos" not in report["findings"]
