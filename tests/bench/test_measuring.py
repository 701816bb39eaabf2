"""What is done with the times: warm-ups, spreads, what is taken from what, and how it is written down."""

import sys
from dataclasses import replace
from time import perf_counter

import pytest
import torch

from cosyq.artifact.reader import open_artifact
from cosyq.bench import machine, parts, timing
from cosyq.bench.cold import until_it_speaks
from cosyq.bench.counts import Operations
from cosyq.bench.machine import Memory, Rates
from cosyq.bench.original import Original, original_on
from cosyq.bench.parts import LanguageModel, Speech, Stage
from cosyq.bench.report import Held, Results, Subject, number, to_json
from cosyq.bench.roofline import Floor, Floors
from cosyq.bench.serve import Served
from cosyq.bench.streams import Answers, Heard, Load, Streams, concurrent
from cosyq.bench.timing import Repeat, Spread
from cosyq.errors import CosyqError
from cosyq.random_model import random_voice
from cosyq.runtime.request import Requests
from cosyq.runtime.synthesizer import load

CPU = torch.device("cpu")


@pytest.fixture
def time(monkeypatch):
    """A clock that goes on by what `time` is told, and by nothing else."""

    class Clock:
        now = 0.0

        def __call__(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


def test_warm_ups_count_for_nothing(time):
    said, turns = [], iter([9.0, 5.0, 1.0, 4.0, 2.0])
    repeat = Repeat(CPU, 2, 3, said.append)
    assert Spread.of(repeat.seconds("work", lambda: time(next(turns)))) == Spread(2.0, 1.0, 4.0)
    assert said == [f"work, run {n} of 5" for n in range(1, 6)]


def test_a_token_is_what_the_prefill_leaves(time, artifact_of):
    """Twenty milliseconds for the prompt and the first id, three for each other."""
    artifact = open_artifact(artifact_of("int8"))
    manner = Requests(artifact).manner({"voice": random_voice(0), "seed": 0})

    class Slow:
        config = artifact.manifest.model

        def speech_tokens(self, given, *, positions, room, generator):
            (part,) = given
            assert part.positions == positions == 30 + 75 + 2
            assert part.minimum == part.maximum <= room == 50
            time(0.017)
            for _ in range(part.maximum):
                time(0.003)
                yield 0

    found = parts.language_model(Repeat(CPU, 1, 3, lambda _: None), Slow(), manner, 50)
    assert found.prefill_seconds.median == pytest.approx(0.020)
    assert found.token_seconds.median == pytest.approx(0.003)
    assert (found.positions, found.seconds) == (107, pytest.approx(0.017 + 50 * 0.003))


def test_streams_go_through_the_servers_rows(artifact_of, monkeypatch):
    """Six at once on a CPU are four at a time and two that wait."""
    monkeypatch.setattr("cosyq.bench.streams.WORDS", "yes")
    tts = load(artifact_of("int8"), device="cpu")
    manner = tts.requests.manner({"voice": None, "seed": 0})
    said = []
    found = concurrent(tts, manner, Load((1, 6), 2, 0), said.append)
    assert found.alone == ()
    one, six = found.streams
    assert (one.streams, one.rows, one.requests) == (1, 4, 2)
    assert (six.streams, six.rows, six.requests) == (6, 4, 12)
    assert six.audio_seconds_per_second > 0
    assert 0 < six.first_audio_seconds_p50 <= six.first_audio_seconds_p95
    assert six.first_audio_seconds_p95 > one.first_audio_seconds_p50
    assert said == ["streams, to warm up", "streams, 1 at once", "streams, 6 at once"]


def test_a_request_that_would_have_fallen_silent_is_seen(time):
    def pieces(pause):
        for before, samples in ((0.3, 50), (0.4, 100), (pause, 10), (0.01, 10)):
            time(before)
            yield samples
        time(0.2)

    assert Heard.of(pieces(0.9), 100) == Heard(pytest.approx(0.3), pytest.approx(1.81), 1.7, 0)
    assert Heard.of(pieces(1.9), 100).late == pytest.approx(0.4 + 1.9 - 1.5)  # before: 1.5 s of audio


def test_a_process_is_timed_to_its_first_byte_and_ended():
    code = "import time; time.sleep(0.2); print('x', flush=True); time.sleep(60)"
    started = perf_counter()
    assert until_it_speaks([sys.executable, "-c", code]) > 0.2
    assert perf_counter() - started < 30
    with pytest.raises(CosyqError, match=r"without audio \(error: no voice\)"):
        until_it_speaks([sys.executable, "-c", "import sys; sys.exit('error: no voice')"])


@pytest.mark.skipif(not machine.CLEAR_REFS.exists(), reason="Linux only")
def test_a_peak_is_forgotten():
    much = 200 << 20
    machine.forget_peak(CPU)
    before = machine.memory(CPU)
    assert torch.ones(much, dtype=torch.uint8)[-1]
    after = machine.memory(CPU)
    assert after.peak - before.peak > 0.9 * much
    assert after.used - before.used < 0.5 * much
    machine.forget_peak(CPU)
    assert machine.memory(CPU).peak < after.peak - 0.5 * much


def test_the_rates_of_this_machine():
    found = machine.rates(CPU, torch.float32, lambda _: None)
    assert 1e8 < found.bytes_per_second < 1e13
    assert 1e8 < found.operations_per_second < 1e15


# ---- the report

SUBJECT = Subject(
    "some", "0" * 64, "fused", "bfloat16", "NVIDIA H100 80GB HBM3", None, {"cosyq": "0"}, 10, 3.0, 10, 3, 7
)
LM = LanguageModel(107, 250, Spread(0.0058, 0.005, 0.006), Spread(0.0005, 0.0004, 0.0006))
FULL = Results(
    SUBJECT,
    load_seconds=1.8,
    language_model=LM,
    flow=Stage(Spread(0.02, 0.019, 0.023)),
    vocoder=Stage(Spread(0.004, 0.004, 0.004)),
    speech=Speech(10.0, Spread(0.0168, 0.016, 0.017), 4.6, Spread(0.024, 0.02, 0.03), Spread(0.0314, 0.03, 0.04)),
    memory_bytes=Held({"llm": 3 << 20, "flow": 2 << 20}, Memory(0, 0, 0), Memory(5 << 20, 6 << 20), Memory(1, 7 << 20)),
    rates=Rates(2.9e12, 7e14),
    floors=Floors(*(Floor.of(290_000_000, Operations(7, 0), Rates(2.9e12, 7e14)) for _ in range(4))),
)


def rows_of(results):
    found = to_json(results)
    return {row[0]: dict(zip(found["columns"][1:], row[1:], strict=True)) for row in found["rows"]}


def test_the_table():
    rows = rows_of(FULL)
    token = rows["a token, 2,000 tokens/s"]
    assert token["measured"] == "0.500 ms"
    assert token["least to most"] == "0.400 ms to 0.600 ms"
    assert (token["floor"], token["times the floor"]) == ("0.100 ms", "5.00")
    assert rows["vocoder, 10 s"]["least to most"] == ""  # all runs alike
    # 5.8 + 249 x 0.5 ms, 20 ms, 4 ms
    assert rows["their shares"]["measured"] == "llm 84%, flow 13%, vocoder 3%"
    assert rows["real-time factor, 10.0 s whole"]["measured"] == "0.0168"
    assert rows["real-time factor, 4.60 s streamed"]["measured"] == "0.0240"
    assert rows["memory, at most"]["measured"] == "7.00 MiB"
    assert rows["the device itself"]["measured"] == "2.90 TB/s, 700 TFLOP/s"
    assert "original, fp32" not in token


def test_columns_without_anything_are_left_out():
    found = to_json(Results(SUBJECT, flow=FULL.flow))
    assert found["columns"] == ["what", "measured", "least to most"]
    assert found["rows"] == [["flow, 10 s of audio", "20.0 ms", "19.0 ms to 23.0 ms"]]
    assert not {"vocoder", "cold", "streams", "floors"} & found.keys()


def test_the_figures():
    found = to_json(FULL)
    assert found["language_model"]["tokens_per_second"] == 2000
    assert found["speech"]["first_audio_seconds"] == {"median": 0.0314, "least": 0.03, "most": 0.04}
    assert (found["speech"]["whole_audio_seconds"], found["speech"]["audio_seconds"]) == (10.0, 4.6)
    assert found["memory_bytes"]["spoken"]["peak"] == 7 << 20
    assert found["floors"]["token"] == {"bytes": 290_000_000, "operations": 7, "seconds": 0.0001}


def test_costs_are_differences_seed_by_seed():
    """The second request is four seconds longer on both sides."""
    own = Answers((), (Heard(0.100, 1.0, 3.0, 0.0), Heard(0.300, 5.0, 9.0, 0.0), Heard(0.200, 2.0, 4.0, 0.0)))
    streams = (Streams(1, 16, 3, 60.0, 0.104, 0.2, 0), Streams(32, 16, 96, 200.0, 0.5, 0.9, 7))
    served = Answers(
        streams, (Heard(0.103, 1.0015, 3.0, 0.0), Heard(0.302, 5.004, 9.0, 0.0), Heard(0.204, 2.002, 4.0, 0.0))
    )
    found = Served.of(served, own)
    assert found.requests == 3
    assert found.first_audio_seconds.median == 0.204
    assert found.engine_first_audio_seconds == Spread(0.200, 0.100, 0.300)
    assert found.first_audio_cost_seconds.median == pytest.approx(0.003)
    assert found.first_audio_cost_seconds.most == pytest.approx(0.004)
    assert found.whole_cost_seconds.median == pytest.approx(0.002)

    report = to_json(Results(SUBJECT, streams=streams, served=found))
    assert report["rows"] == [
        ["1 stream", "60.0 s of audio a second, first audio 104 ms, p95 200 ms", ""],
        [
            "32 streams, 16 at a time",
            "200 s of audio a second, first audio 500 ms, p95 900 ms, 7 of 96 interrupted",
            "",
        ],
        ["1 client over HTTP", "60.0 s of audio a second, first audio 104 ms, p95 200 ms", ""],
        [
            "32 clients over HTTP, 16 at a time",
            "200 s of audio a second, first audio 500 ms, p95 900 ms, 7 of 96 interrupted",
            "",
        ],
        ["first audio, engine alone", "200 ms", "100 ms to 300 ms"],
        ["first audio over HTTP", "204 ms", "103 ms to 302 ms"],
        ["what HTTP adds to the first audio", "3.00 ms", "2.00 ms to 4.00 ms"],
        ["what HTTP adds to the last audio", "2.00 ms", "1.50 ms to 4.00 ms"],
    ]
    assert report["served"]["first_audio_cost_seconds"] == {"median": 0.003, "least": 0.002, "most": 0.004}
    assert [s["streams"] for s in report["served"]["streams"]] == [1, 32]


def test_the_original_stands_beside_the_same_work_on_the_same_card(artifact_of):
    small = open_artifact(artifact_of("int8")).manifest.model
    full = replace(
        small,
        llm=replace(small.llm, hidden_size=896, num_layers=24),
        flow=replace(small.flow, dim=1024, depth=22),
        vocoder=replace(small.vocoder, base_channels=512),
    )
    assert original_on("NVIDIA H100 80GB HBM3", full, 10, 3.08) == Original()
    for other in (
        ("NVIDIA H100 PCIe", full, 10, 3.08),
        ("AMD EPYC", full, 10, 3.08),
        ("NVIDIA H100 80GB HBM3", small, 10, 3.08),
        ("NVIDIA H100 80GB HBM3", full, 5, 3.08),
        ("NVIDIA H100 80GB HBM3", full, 10, 0.0),
    ):
        assert original_on(*other) is None
    rows = rows_of(replace(FULL, original=Original()))
    assert rows["flow, 10 s of audio"]["original, fp32"] == "263 ms"
    assert rows["memory, at most"]["original, fp32"] == "3,481 MiB"
    assert rows["real-time factor, 10.0 s whole"]["original, fp32"] == "0.553"
    assert rows["load"]["original, fp32"] == ""


def test_numbers_have_three_digits():
    assert [number(n) for n in (0, 0.0167, 0.5, 1.0, 23.44, 1927.3)] == [
        "0",
        "0.0167",
        "0.500",
        "1.00",
        "23.4",
        "1,927",
    ]
