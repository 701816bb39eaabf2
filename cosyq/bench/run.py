"""An artifact and what is wanted of it in, figures out: part after part, on one engine."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cosyq.artifact.reader import Artifact
from cosyq.bench import Part, machine, parts
from cosyq.bench.cold import COLD_RUNS, cold_start
from cosyq.bench.original import original_on
from cosyq.bench.report import Held, Results, Subject
from cosyq.bench.roofline import floors
from cosyq.bench.serve import ALONE, Served, over_http
from cosyq.bench.streams import ROUNDS, Answers, Load, concurrent
from cosyq.bench.timing import RUNS, WARM_UPS, Repeat, Say, synchronize
from cosyq.errors import UsageError
from cosyq.random_model import random_voice
from cosyq.runtime.engine import EngineChoice, pick_device, pick_dtype, pick_engine
from cosyq.runtime.request import Manner, Requests
from cosyq.runtime.synthesizer import load


@dataclass(frozen=True)
class Wanted:
    """What to measure, and on what.

    parts: serve brings streams along, which it is compared with.
    voice, steps: as in `runtime.request.Options`; without a voice, and of an artifact that has none, a random one.
    engine, device, dtype: as in `runtime.synthesizer.load`.
    seconds: of audio, of a stage by itself and of an utterance that is spoken whole.
    runs: of each part; None leaves it to the device.
    streams: how many at once, one count after another.
    """

    parts: frozenset[Part]
    voice: str | None
    steps: int | None
    engine: EngineChoice
    device: str
    dtype: str
    seconds: int
    runs: int | None
    streams: Sequence[int]


def bench(artifact: Artifact, wanted: Wanted, say: Say) -> Results:
    """Measure.

    Raises:
        UsageError: the voice or the number of flow steps is unknown, or no utterance can be that long; or a server
            would take another number of flow steps.
        ArtifactError: the voice or the artifact is damaged.
        DeviceError: the device is missing or too small.
        CosyqError: a cold start or a server failed.
    """
    device = pick_device(wanted.device)
    engine, dtype = pick_engine(wanted.engine, device), pick_dtype(wanted.dtype, device)
    repeat = Repeat(device, WARM_UPS[device.type], wanted.runs or RUNS[device.type], say)
    manner, tokens = _asked(artifact, wanted)
    asked = Load(wanted.streams, wanted.runs or ROUNDS[device.type], ALONE if "serve" in wanted.parts else 0)
    model, prompt = artifact.manifest.model, manner.voice.prompt_tokens.numel()
    subject = Subject(
        artifact=artifact.manifest.name,
        recipe_sha256=artifact.manifest.recipe_sha256,
        engine=engine,
        dtype=str(dtype).removeprefix("torch."),
        device=machine.device_name(device),
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        versions=machine.library_versions(),
        audio_seconds=wanted.seconds,
        prompt_seconds=wanted.seconds * prompt / tokens,
        flow_steps=manner.steps,
        warm_ups=repeat.warm_ups,
        runs=repeat.runs,
    )
    original = original_on(subject.device, model, wanted.seconds, subject.prompt_seconds)
    found, spoken = Results(subject, original=original), None
    place = {"engine": engine, "device": str(device), "dtype": wanted.dtype}
    if wanted.parts != {"cold"}:
        found, spoken = _on_one_engine(artifact, wanted, manner, tokens, dtype, repeat, asked, found)
        _let_go(device)
    if "serve" in wanted.parts:
        assert spoken is not None
        served = over_http(artifact, manner, place, asked, spoken.streams[0].rows, device, say)
        found = replace(found, served=Served.of(served, spoken))
    if "cold" in wanted.parts:
        found = replace(found, cold=cold_start(artifact.folder, manner, place, wanted.runs or COLD_RUNS, say))
    return found


def _asked(artifact: Artifact, wanted: Wanted) -> tuple[Manner, int]:
    """How to speak, and how many speech ids the stages and an utterance are of."""
    nobody = wanted.voice is None and not artifact.voice_files()
    requests, model = Requests(artifact), artifact.manifest.model
    voice = random_voice(parts.SEED) if nobody else wanted.voice
    manner = requests.manner({"voice": voice, "steps": wanted.steps, "seed": parts.SEED})
    if "serve" in wanted.parts and manner.steps != (served := artifact.manifest.flow_steps[0]):
        where, remedy = f"{manner.steps} flow steps", "measure it with those, or name other parts than serve"
        raise UsageError(f"a server of this artifact takes {served}", where=where, remedy=remedy)
    samples = model.vocoder.samples_per_frame * model.flow.token_mel_ratio  # of an id
    tokens, room = round(wanted.seconds * model.vocoder.sample_rate / samples), requests.room(manner.voice)
    if tokens > room:
        raise UsageError(f"no utterance has {tokens} speech tokens (at most {room})", where=f"{wanted.seconds} seconds")
    return manner, tokens


def _on_one_engine(
    artifact: Artifact,
    wanted: Wanted,
    manner: Manner,
    tokens: int,
    dtype: torch.dtype,
    repeat: Repeat,
    asked: Load,
    found: Results,
) -> tuple[Results, Answers | None]:
    """`found`, with all parts but those of other processes, and what the part `streams` heard.

    The device is probed last: its buffers are not the engine's.
    """
    device, chosen = repeat.device, wanted.parts
    repeat.say("loading")
    synchronize(device)  # taking a GPU into use is no part of loading
    machine.forget_peak(device)
    before = machine.memory(device)
    tts = load(artifact, device=wanted.device, dtype=wanted.dtype, engine=wanted.engine)
    engine, loaded = tts.engine, machine.memory(device)
    found = replace(found, load_seconds=tts.load_seconds)
    if "llm" in chosen:
        found = replace(found, language_model=parts.language_model(repeat, engine, manner, tokens))
    if "flow" in chosen:
        found = replace(found, flow=parts.flow(repeat, engine, manner, tokens))
    if "vocoder" in chosen:
        found = replace(found, vocoder=parts.vocoder(repeat, engine, tokens))
    if "speech" in chosen:
        found = replace(found, speech=parts.speech(repeat, tts, manner, tokens))
    found = replace(found, memory_bytes=Held(engine.weights, before, loaded, machine.memory(device)))
    spoken = None
    if chosen & {"streams", "serve"}:
        spoken = concurrent(tts, manner, asked, repeat.say)
        found = replace(found, streams=spoken.streams)
    if chosen & {"llm", "flow", "vocoder"}:
        rates = machine.rates(device, dtype, repeat.say)
        best = floors(
            artifact,
            engine.weights,
            rates,
            positions=parts.prompt_positions(manner),
            prompt=manner.voice.prompt_tokens.numel(),
            tokens=tokens,
            steps=manner.steps,
            itemsize=dtype.itemsize,
        )
        found = replace(found, rates=rates, floors=best)
    return found, spoken


def _let_go(device: torch.device) -> None:
    """Give an engine's memory back, for the processes that come next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
