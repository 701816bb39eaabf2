"""One engine, one request at a time: each stage by itself, then speech, whole and as a stream.

A stage is given random numbers of a likely size: what it costs does not depend on what it says.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from cosyq.bench.timing import Repeat, Spread, synchronize
from cosyq.model.vocoder import StreamState
from cosyq.runtime.decode import Part
from cosyq.runtime.engine import Engine
from cosyq.runtime.request import Manner, Options
from cosyq.runtime.synthesizer import Synthesizer

WORDS = "the quick brown fox jumps over the lazy dog and then it rests. "
TEXT_IDS = 30  # of the language model's own measurement
SEED = 1


@dataclass(frozen=True)
class LanguageModel:
    """prefill: all positions of a prompt, and the first id. token: each later one, of `tokens` in all."""

    positions: int
    tokens: int
    prefill_seconds: Spread
    token_seconds: Spread

    @property
    def seconds(self) -> float:
        return self.prefill_seconds.median + (self.tokens - 1) * self.token_seconds.median


@dataclass(frozen=True)
class Stage:
    """The flow or the vocoder, of a whole utterance."""

    run_seconds: Spread

    @property
    def seconds(self) -> float:
        return self.run_seconds.median


@dataclass(frozen=True)
class Speech:
    """An utterance of a given number of speech ids, whole; and a sentence, as long as it gets, streamed.

    A real-time factor is seconds of work a second of audio.
    """

    whole_audio_seconds: float
    real_time_factor: Spread
    audio_seconds: float  # of the sentence
    streamed_real_time_factor: Spread
    first_audio_seconds: Spread


def prompt_positions(manner: Manner) -> int:
    """Of the language model: text, the voice's prompt, and a mark before each."""
    return TEXT_IDS + manner.voice.prompt_tokens.numel() + 2


def language_model(repeat: Repeat, engine: Engine, manner: Manner, tokens: int) -> LanguageModel:
    c, speech = engine.config.llm, manner.voice.prompt_tokens.tolist()
    draw = torch.Generator().manual_seed(SEED)
    text = torch.randint(0, min(1000, c.text_rows), (TEXT_IDS,), generator=draw).tolist()
    shown: tuple[tuple[list[int], list[int]], ...] = (([], [c.sos]), (text, [c.task_id, *speech]))

    def drawn(count: int) -> list[int]:
        part = Part(shown=shown, minimum=count, maximum=count)
        generator = torch.Generator().manual_seed(SEED)
        return list(engine.speech_tokens([part], positions=part.positions, room=tokens, generator=generator))

    prefill = Spread.of(repeat.seconds("language model, prefill", lambda: drawn(1)))
    whole = repeat.seconds("language model", lambda: drawn(tokens))
    token = Spread.of((run - prefill.median) / (tokens - 1) for run in whole)
    return LanguageModel(prompt_positions(manner), tokens, prefill, token)


def flow(repeat: Repeat, engine: Engine, manner: Manner, tokens: int) -> Stage:
    draw = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, engine.config.flow.vocab, (tokens,), generator=draw).tolist()
    how: dict[str, Any] = {"streaming": False, "final": True, "steps": manner.steps}
    return Stage(Spread.of(repeat.seconds("flow", lambda: engine.mel(ids, manner.voice, **how))))


def vocoder(repeat: Repeat, engine: Engine, tokens: int) -> Stage:
    c = engine.config.flow
    draw = torch.Generator().manual_seed(SEED)
    mel = torch.randn(c.mel_dim, c.token_mel_ratio * tokens, generator=draw).to(engine.device)
    return Stage(Spread.of(repeat.seconds("vocoder", lambda: engine.samples(mel, StreamState(), final=True))))


def speech(repeat: Repeat, tts: Synthesizer, manner: Manner, tokens: int) -> Speech:
    """All that `Synthesizer.synthesize` does, but that `tokens` speech ids are drawn; and `Synthesizer.stream`.

    Where more of those ids are silent in a row than a listener hears, the audio is shorter than they are.
    """
    options: Options = {"voice": manner.voice, "steps": manner.steps, "seed": SEED}
    rate, device = tts.sample_rate, tts.engine.device

    def whole() -> tuple[float, float]:
        """Seconds of audio, and of work."""
        synchronize(device)
        started = time.perf_counter()
        asked = tts.requests.manner(options)
        utterance = tts.requests.utterances(WORDS, asked)[0]
        exact = replace(utterance, part=replace(utterance.part, minimum=tokens, maximum=tokens))
        samples = tts.whole([exact], asked).samples
        return len(samples) / rate, time.perf_counter() - started

    def streamed() -> tuple[float, float, float]:
        """Seconds of audio, and of work until the first of it and until the last."""
        synchronize(device)
        started, first, count = time.perf_counter(), 0.0, 0
        for chunk in tts.stream(WORDS, **options):
            first = first or time.perf_counter() - started
            count += len(chunk.samples)
        return count / rate, first, time.perf_counter() - started

    done, chunks = repeat("an utterance", whole), repeat("a sentence, streamed", streamed)
    return Speech(
        whole_audio_seconds=done[0][0],  # the same in every run: the seed fixes it
        real_time_factor=Spread.of(work / audio for audio, work in done),
        audio_seconds=chunks[0][0],
        streamed_real_time_factor=Spread.of(last / audio for audio, _, last in chunks),
        first_audio_seconds=Spread.of(first for _, first, _ in chunks),
    )
