"""Text and a voice in, audio out: the library's front door.

tts = load("artifacts/fun-cosyvoice3-0.5b-int8")
audio = tts.synthesize("Hello.", voice="default", seed=7)
for chunk in tts.stream("A longer text.", voice="default"): ...
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from cosyq.artifact.reader import Artifact, open_artifact
from cosyq.errors import UsageError
from cosyq.model.vocoder import StreamState
from cosyq.runtime.decode import shorten_silence
from cosyq.runtime.engine import Engine, EngineChoice, TorchEngine, pick_device, pick_dtype, pick_engine
from cosyq.runtime.schedule import chunk_ends
from cosyq.runtime.speed import FASTEST, SLOWEST, Pace
from cosyq.text.prompt import compose
from cosyq.voices.voice import Voice, load_voice

MIN_SPEECH_PER_TEXT, MAX_SPEECH_PER_TEXT = 2, 20  # speech tokens per text token, the original's bounds
MAX_SEED = 2**63 - 1
PARAGRAPH_PAUSE = 0.4  # seconds
NEUTRAL = "neutral"  # the voice of an artifact without voices: no speaker vector, the flow's average


@dataclass(frozen=True)
class Timings:
    """Seconds and counts of one utterance. For a chunk of a stream, of everything up to it."""

    load_seconds: float
    first_audio_seconds: float
    total_seconds: float
    audio_seconds: float
    text_tokens: int
    speech_tokens: int
    token_seconds: float  # spent in the language model
    finish: str  # "stop", "length", or "" while it goes on

    @property
    def real_time_factor(self) -> float:
        return self.total_seconds / self.audio_seconds if self.audio_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.speech_tokens / self.token_seconds if self.token_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "real_time_factor": self.real_time_factor,
            "tokens_per_second": self.tokens_per_second,
        }


@dataclass(frozen=True)
class Audio:
    """samples: [n] float32 in -1..1."""

    samples: NDArray[np.float32]
    sample_rate: int
    seed: int
    timings: Timings


@dataclass(frozen=True)
class _Utterance:
    """One request, checked, before any network runs."""

    voice: Voice
    text: list[int]
    words: int
    prompt_speech: list[int]
    minimum: int
    maximum: int
    pause: int  # samples of silence after it
    steps: int
    speed: float
    seed: int


class Options(TypedDict, total=False):
    """How to speak.

    voice: a name, a path to a voice file, or a value; see `find_voice`.
    seed: fixes the audio; None draws one, which the result names.
    steps: Euler steps of the flow, one of those the artifact was built for.
    speed: 0.5 to 2.
    instruct: how to say it ("speak slowly"); the voice's transcript is then left out.
    cross_lingual: leave the transcript out, for a voice that speaks another language than the text.
    normalize: read numbers, symbols and abbreviations (`text.normalize`), the default; False says the text as it is.
    """

    voice: str | Voice | None
    seed: int | None
    steps: int | None
    speed: float
    instruct: str | None
    cross_lingual: bool
    normalize: bool


def voice_names(artifact: Artifact) -> list[str]:
    return list(artifact.voice_files()) or [NEUTRAL]


def find_voice(artifact: Artifact, name: str | None = None) -> Voice:
    """A voice of the artifact by name, or from a .safetensors file by path; None is `default` or the first one.

    Raises:
        UsageError: there is no such voice.
        ArtifactError: its file is damaged or does not fit.
    """
    config, files = artifact.manifest.model.flow, artifact.voice_files()
    if name is None:
        name = "default" if "default" in files else next(iter(files), NEUTRAL)
    if name in files:
        return load_voice(files[name], config)
    if name == NEUTRAL:
        return Voice.from_speaker(NEUTRAL, torch.zeros(config.speaker_dim), config.mel_dim)
    if name.endswith(".safetensors"):
        return load_voice(Path(name), config)
    raise UsageError("unknown voice", where=name, remedy=f"the artifact has: {', '.join(voice_names(artifact))}")


class Synthesizer:
    """An artifact, loaded into an engine. Requests share nothing but the weights."""

    def __init__(self, artifact: Artifact, engine: Engine, load_seconds: float = 0.0):
        self.artifact, self.engine, self.load_seconds = artifact, engine, load_seconds
        self._tokenizer = artifact.tokenizer()

    @property
    def sample_rate(self) -> int:
        return self.engine.config.vocoder.sample_rate

    def voices(self) -> list[str]:
        return voice_names(self.artifact)

    def voice(self, name: str | None = None) -> Voice:
        """A voice of the artifact; see `find_voice`."""
        return find_voice(self.artifact, name)

    def synthesize(self, text: str, **options: Unpack[Options]) -> Audio:
        """Speak `text` and return it whole.

        Raises:
            UsageError: the text, the voice or an option is not usable.
            DeviceError: the device ran out of memory or of finite numbers.
        """
        parts = list(self.utterances(text, **options))
        return replace(parts[-1], samples=np.concatenate([part.samples for part in parts]))

    def utterances(self, text: str, **options: Unpack[Options]) -> Iterator[Audio]:
        """Speak `text` utterance by utterance, about a sentence or two each; options and errors as in `synthesize`.

        The flow attends to the whole of each. Memory does not grow with the text.
        """
        return self._utterances(self._prepare(text, options))

    def _utterances(self, utterances: list[_Utterance]) -> Iterator[Audio]:
        clock = _Clock(self.load_seconds, utterances)
        for utterance in utterances:
            tokens = list(self._speech(utterance, clock))
            audio = self._render(tokens, utterance.voice, utterance.steps, utterance.speed, clock)
            yield self._paused(audio, utterance, clock)

    def convert(self, tokens: list[int], *, voice: str | Voice | None = None, steps: int | None = None) -> Audio:
        """Say the speech ids of a recording (`voices.enrol.Encoders`) in another voice.

        Raises:
            UsageError: there is nothing to say, or it is too long beside the voice's prompt.
        """
        chosen, count = self._voice(voice), len(tokens)
        if not 0 < count <= self._room(chosen):
            raise UsageError(f"{count} speech tokens cannot be converted (1 to {self._room(chosen)})")
        return self._render(tokens, chosen, self._steps(steps), 1.0, _Clock(self.load_seconds, []))

    def _render(self, tokens: list[int], voice: Voice, steps: int, speed: float, clock: _Clock) -> Audio:
        mel = self.engine.mel(tokens, voice, streaming=False, final=True, steps=steps)
        samples = self.engine.samples(Pace(speed).frames(mel), StreamState(), final=True).numpy()
        return Audio(samples, self.sample_rate, clock.seed, clock.read(len(samples), self.sample_rate))

    def _paused(self, audio: Audio, utterance: _Utterance, clock: _Clock) -> Audio:
        """The last audio of an utterance, with the pause after it."""
        if not utterance.pause:
            return audio
        timings = clock.read(utterance.pause, self.sample_rate)
        return replace(audio, samples=np.pad(audio.samples, (0, utterance.pause)), timings=timings)

    def stream(self, text: str, **options: Unpack[Options]) -> Iterator[Audio]:
        """Speak `text` chunk by chunk; options and errors as in `synthesize`.

        The chunks of an utterance together equal one block-causal pass over it. Everything is checked before the
        generator is returned; closing it stops the work.
        """
        return self._stream(self._prepare(text, options))

    def _stream(self, utterances: list[_Utterance]) -> Iterator[Audio]:
        clock = _Clock(self.load_seconds, utterances)
        for utterance in utterances:
            yield from self._stream_utterance(utterance, clock)

    def _stream_utterance(self, utterance: _Utterance, clock: _Clock) -> Iterator[Audio]:
        flow, state, pace = self.engine.config.flow, StreamState(), Pace(utterance.speed)
        tokens: list[int] = []
        sent = 0  # frames of the flow that were passed on
        ends = chunk_ends(utterance.voice.prompt_tokens.numel(), flow.chunk_frames // flow.token_mel_ratio)
        end = next(ends)
        for token in self._speech(utterance, clock):
            tokens.append(token)
            if len(tokens) == end + flow.lookahead:
                mel = self.engine.mel(tokens, utterance.voice, streaming=True, final=False, steps=utterance.steps)
                samples = self.engine.samples(pace.frames(mel[:, sent:]), state, final=False).numpy()
                sent, end = mel.shape[1], next(ends)
                if len(samples):
                    yield Audio(samples, self.sample_rate, clock.seed, clock.read(len(samples), self.sample_rate))
        mel = self.engine.mel(tokens, utterance.voice, streaming=True, final=True, steps=utterance.steps)
        samples = self.engine.samples(pace.frames(mel[:, sent:]), state, final=True).numpy()
        audio = Audio(samples, self.sample_rate, clock.seed, clock.read(len(samples), self.sample_rate))
        yield self._paused(audio, utterance, clock)

    def _speech(self, utterance: _Utterance, clock: _Clock) -> Iterator[int]:
        """The utterance's speech ids as they are drawn, long silences shortened."""
        drawn = self.engine.speech_tokens(
            utterance.text,
            utterance.prompt_speech,
            minimum=utterance.minimum,
            maximum=utterance.maximum,
            generator=torch.Generator().manual_seed(utterance.seed),
        )
        return shorten_silence(clock.counted(drawn), self.engine.config.llm.silent_tokens)

    def _steps(self, steps: int | None) -> int:
        tables = self.artifact.manifest.flow_steps
        if steps is None:
            return tables[0]
        if steps not in tables:
            remedy = f"it has: {', '.join(map(str, tables))}"
            raise UsageError("the artifact has no table for so many flow steps", where=str(steps), remedy=remedy)
        return steps

    def _voice(self, voice: str | Voice | None) -> Voice:
        chosen = voice if isinstance(voice, Voice) else self.voice(voice)
        chosen.check(self.engine.config.flow, chosen.name)
        return chosen

    def _room(self, voice: Voice) -> int:
        """Speech tokens that fit beside a voice's prompt under the flow's fixed noise."""
        flow = self.engine.config.flow
        return flow.noise_frames // flow.token_mel_ratio - voice.prompt_tokens.numel()

    def _prepare(self, text: str, options: Options) -> list[_Utterance]:
        if unknown := options.keys() - Options.__annotations__.keys():
            raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
        steps, voice = self._steps(options.get("steps")), self._voice(options.get("voice"))
        seed, speed = options.get("seed"), options.get("speed", 1.0)
        if seed is None:
            seed = secrets.randbelow(1 << 31)
        if not 0 <= seed <= MAX_SEED:
            raise UsageError("a seed is a number from 0 to 2^63 - 1", where=str(seed))
        if not SLOWEST <= speed <= FASTEST:
            raise UsageError(f"a speed is a number from {SLOWEST} to {FASTEST}", where=str(speed))
        transcript = "" if options.get("cross_lingual") else voice.transcript
        prompted = compose(
            text,
            transcript,
            self._tokenizer,
            instruction=options.get("instruct") or "",
            normalized=options.get("normalize", True),
        )
        room, pause = self._room(voice), round(PARAGRAPH_PAUSE * self.sample_rate)
        return [
            _Utterance(
                voice=voice,
                text=item.prompt + item.words,
                words=len(item.words),
                prompt_speech=voice.prompt_tokens.tolist() if item.with_speech else [],
                minimum=min(MIN_SPEECH_PER_TEXT * len(item.words), room),
                maximum=min(MAX_SPEECH_PER_TEXT * len(item.words), room),
                pause=pause if item.ends_paragraph and item is not prompted[-1] else 0,
                steps=steps,
                speed=speed,
                seed=(seed + index) % (MAX_SEED + 1),
            )
            for index, item in enumerate(prompted)
        ]


class _Clock:
    """Times one request, over all its utterances."""

    def __init__(self, load_seconds: float, utterances: list[_Utterance]):
        self.seed = utterances[0].seed if utterances else 0  # the request's own: what reproduces it
        self._start = time.perf_counter()
        self._base = Timings(load_seconds, 0.0, 0.0, 0.0, sum(u.words for u in utterances), 0, 0.0, "")

    def counted(self, tokens: Iterator[int]) -> Iterator[int]:
        """Pass the language model's tokens on, counting them and its time, and keep how it ended."""
        while True:
            started = time.perf_counter()
            try:
                token = next(tokens)
            except StopIteration as stop:
                if self._base.finish != "length":  # one that was cut is worth knowing of
                    self._base = replace(self._base, finish=stop.value)
                return
            spent = self._base.token_seconds + time.perf_counter() - started
            self._base = replace(self._base, speech_tokens=self._base.speech_tokens + 1, token_seconds=spent)
            yield token

    def read(self, samples: int, sample_rate: int) -> Timings:
        """The timings now that `samples` more were made."""
        now = time.perf_counter() - self._start
        first = self._base.first_audio_seconds or now
        seconds = self._base.audio_seconds + samples / sample_rate
        self._base = replace(self._base, first_audio_seconds=first, total_seconds=now, audio_seconds=seconds)
        return self._base


def load(
    artifact: str | Path | Artifact, *, device: str = "auto", dtype: str = "auto", engine: EngineChoice = "auto"
) -> Synthesizer:
    """Open an artifact and put it on a device.

    Args:
        artifact: a folder, or an artifact that was opened already.
        device: auto, cpu, cuda or cuda:N.
        dtype: what matrix products are computed in: auto, bf16, fp16 or fp32.
        engine: auto, `reference`, `unpacked` or `bnb`; see `runtime.engine`.

    Raises:
        ArtifactError: it is missing, damaged or too new.
        DeviceError: the device is missing or too small.
    """
    started = time.perf_counter()
    opened = artifact if isinstance(artifact, Artifact) else open_artifact(Path(artifact))
    place = pick_device(device)
    networks = TorchEngine(opened, pick_engine(engine, place), place, pick_dtype(dtype, place))
    return Synthesizer(opened, networks, time.perf_counter() - started)
