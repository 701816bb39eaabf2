"""What was measured, as a table for people and as figures for programs: the JSON object of an artifact's bench.json."""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass, field
from math import floor, log10
from typing import Any

from cosyq.bench.cold import Cold
from cosyq.bench.machine import Memory, Rates
from cosyq.bench.original import Original
from cosyq.bench.parts import LanguageModel, Speech, Stage
from cosyq.bench.roofline import Floor, Floors
from cosyq.bench.serve import Served
from cosyq.bench.streams import Streams
from cosyq.bench.timing import Spread

DIGITS = 4  # that are kept of a figure; the next ones differ from run to run
COLUMNS = ("what", "measured", "least to most", "floor", "times the floor", "original, fp32")


@dataclass(frozen=True)
class Subject:
    """What was measured, with what and on what; no path and no voice's name, since a report may be published."""

    artifact: str
    recipe_sha256: str
    engine: str
    dtype: str
    device: str
    threads: int | None  # of a CPU
    versions: dict[str, str]
    audio_seconds: int  # of a stage by itself, and of an utterance that is spoken whole
    prompt_seconds: float
    flow_steps: int
    warm_ups: int
    runs: int
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())


@dataclass(frozen=True)
class Held:
    """Bytes of each stage's weights, and the process's or the GPU's memory before loading and after; then its peak."""

    weights: dict[str, int]
    before: Memory
    loaded: Memory
    spoken: Memory


@dataclass(frozen=True)
class Results:
    """What was not measured is None, or empty."""

    subject: Subject
    load_seconds: float | None = None
    language_model: LanguageModel | None = None
    flow: Stage | None = None
    vocoder: Stage | None = None
    speech: Speech | None = None
    memory_bytes: Held | None = None
    streams: tuple[Streams, ...] = ()
    served: Served | None = None
    cold: Cold | None = None
    rates: Rates | None = None
    floors: Floors | None = None
    original: Original | None = None


@dataclass(frozen=True)
class Row:
    what: str
    measured: str
    spread: str = ""
    floor: str = ""
    times: str = ""
    original: str = ""


def to_json(results: Results) -> dict[str, Any]:
    """The table as `publish.reports` reads it, and every figure in seconds and bytes."""
    rows = _rows(results)
    cells = [(row.what, row.measured, row.spread, row.floor, row.times, row.original) for row in rows]
    kept = [index for index in range(len(COLUMNS)) if index < 2 or any(line[index] for line in cells)]
    figures = asdict(results)
    figures |= {"subject": None, "original": None}
    if results.language_model:
        figures["language_model"]["tokens_per_second"] = 1 / results.language_model.token_seconds.median
    if results.cold:
        figures["cold"]["ratio"] = results.cold.ratio
    return {
        "about": about(results.subject),
        "columns": [COLUMNS[index] for index in kept],
        "rows": [[line[index] for index in kept] for line in cells],
        **asdict(results.subject),
        **_rounded({name: value for name, value in figures.items() if value}),
    }


def about(subject: Subject) -> str:
    s = subject
    versions = ", ".join(f"{name} {version}" for name, version in s.versions.items())
    threads = "" if s.threads is None else f", {s.threads} thread{'s' if s.threads > 1 else ''}"
    work = f"{s.audio_seconds} s of audio after a prompt of {s.prompt_seconds:.1f} s, {s.flow_steps} flow steps"
    return (
        f"{s.artifact}, engine {s.engine} in {s.dtype}, on {s.device}{threads}; {versions}; {s.date}. Stages by "
        f"themselves for {work}; medians of {s.runs} run{'s' if s.runs > 1 else ''}, after warming up."
    )


def _rows(results: Results) -> list[Row]:
    spoken = [*_speech(results), *_memory(results), *_streams(results), *_served(results)]
    return [*_stages(results), *spoken, *_cold(results)]


def _stages(results: Results) -> list[Row]:
    s, lm, best, original = results.subject, results.language_model, results.floors, results.original
    rows = []
    if results.load_seconds is not None:
        rows.append(Row("load", _time(results.load_seconds)))
    parts = {"llm": lm, "flow": results.flow, "vocoder": results.vocoder}
    took = {name: part.seconds for name, part in parts.items() if part is not None}
    whole = sum(took.values()) if len(took) == len(parts) else None
    if lm is not None:
        was = f"{original.tokens_per_second:.3g} tokens/s" if original else ""
        speed = f"{number(1 / lm.token_seconds.median)} tokens/s"
        rows += [
            _timed(f"prefill of {lm.positions} positions", lm.prefill_seconds, best.prefill if best else None),
            _timed(f"a token, {speed}", lm.token_seconds, best.token if best else None, was),
        ]
    if results.flow is not None:
        was = _time(original.flow_seconds) if original else ""
        rows.append(
            _timed(f"flow, {s.audio_seconds} s of audio", results.flow.run_seconds, best.flow if best else None, was)
        )
    if results.vocoder is not None:
        was = _time(original.vocoder_seconds) if original else ""
        rows.append(
            _timed(f"vocoder, {s.audio_seconds} s", results.vocoder.run_seconds, best.vocoder if best else None, was)
        )
    if whole is not None:
        rows.append(Row("their shares", ", ".join(f"{name} {part / whole:.0%}" for name, part in took.items())))
    if results.rates is not None:
        copied, done = results.rates.bytes_per_second, results.rates.operations_per_second
        rows.append(Row("the device itself", f"{_rate(copied, 'B/s')}, {_rate(done, 'FLOP/s')}"))
    return rows


def _timed(what: str, took: Spread, best: Floor | None, original: str = "") -> Row:
    low = (_time(best.seconds), number(took.median / best.seconds)) if best else ("", "")
    return Row(what, _time(took.median), _range(took, _time), *low, original=original)


def _speech(results: Results) -> list[Row]:
    speech, original = results.speech, results.original
    if speech is None:
        return []
    was = number(original.real_time_factor) if original else ""
    whole, streamed, first = speech.real_time_factor, speech.streamed_real_time_factor, speech.first_audio_seconds
    heard, sentence = (f"{number(seconds)} s" for seconds in (speech.whole_audio_seconds, speech.audio_seconds))
    return [
        Row(f"real-time factor, {heard} whole", number(whole.median), _range(whole, number), original=was),
        Row(f"real-time factor, {sentence} streamed", number(streamed.median), _range(streamed, number)),
        Row("first audio", _time(first.median), _range(first, _time)),
    ]


def _memory(results: Results) -> list[Row]:
    held, original = results.memory_bytes, results.original
    if held is None:
        return []
    rows = [Row("weights", ", ".join(f"{stage} {_size(count)}" for stage, count in held.weights.items()))]
    if held.loaded.used is not None and held.before.used is not None:
        rows.append(Row("memory, loaded", f"{_size(held.loaded.used)}, {_size(held.before.used)} before"))
    if held.spoken.peak is not None:
        was = _size(original.peak_bytes) if original else ""
        rows.append(Row("memory, at most", _size(held.spoken.peak), original=was))
    if held.spoken.peak_reserved is not None:
        rows.append(Row("memory, reserved at most", _size(held.spoken.peak_reserved)))
    return rows


def _streams(results: Results) -> list[Row]:
    rows = []
    for s in results.streams:
        what = "1 stream" if s.streams == 1 else f"{s.streams} streams" + _waiting(s)
        rows.append(Row(what, _heard(s)))
    return rows


def _heard(s: Streams) -> str:
    first = f"first audio {_time(s.first_audio_seconds_p50)}, p95 {_time(s.first_audio_seconds_p95)}"
    gaps = f", {s.interrupted} of {s.requests} interrupted" if s.interrupted else ""
    return f"{number(s.audio_seconds_per_second)} s of audio a second, {first}{gaps}"


def _served(results: Results) -> list[Row]:
    served = results.served
    if served is None:
        return []
    rows = []
    for s in served.streams:
        what = "1 client" if s.streams == 1 else f"{s.streams} clients"
        rows.append(Row(f"{what} over HTTP{_waiting(s)}", _heard(s)))
    singly = {
        "first audio, engine alone": served.engine_first_audio_seconds,
        "first audio over HTTP": served.first_audio_seconds,
        "what HTTP adds to the first audio": served.first_audio_cost_seconds,
        "what HTTP adds to the last audio": served.whole_cost_seconds,
    }
    return rows + [Row(what, _time(took.median), _range(took, _time)) for what, took in singly.items()]


def _waiting(streams: Streams) -> str:
    return f", {streams.rows} at a time" if streams.rows < streams.streams else ""


def _cold(results: Results) -> list[Row]:
    cold, original = results.cold, results.original
    if cold is None:
        return []
    first, bare = cold.first_audio_seconds, cold.bare_seconds
    was = _time(original.cold_seconds) if original else ""
    ratio = number(original.cold_ratio) if original else ""
    return [
        Row("process start to first audio", _time(first.median), _range(first, _time), original=was),
        Row("process start to torch and device", _time(bare.median), _range(bare, _time)),
        Row("the first by the second", number(cold.ratio), original=ratio),
    ]


def number(value: float) -> str:
    """Three significant digits, written out."""
    if value == 0:
        return "0"
    digits = max(2 - floor(log10(abs(value))), 0)
    return f"{value:,.{digits}f}"


def _time(value: float) -> str:
    return f"{number(value)} s" if value >= 1 else f"{number(1000 * value)} ms"


def _rate(value: float, unit: str) -> str:
    return f"{number(value / 1e12)} T{unit}" if value >= 1e12 else f"{number(value / 1e9)} G{unit}"


def _size(count: int) -> str:
    return f"{number(count / 2**20)} MiB"


def _range(spread: Spread, written: Any) -> str:
    return "" if spread.least == spread.most else f"{written(spread.least)} to {written(spread.most)}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value
