"""Text and a voice in, audio out: the library's front door.

tts = load("artifacts/fun-cosyvoice3-0.5b-int8")
audio = tts.synthesize("Hello.", voice="default", seed=7)
for chunk in tts.stream("A longer text.", voice="default"): ...
for chunk in tts.stream_text(chatbot.tokens(), voice="default"): ...
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator
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
from cosyq.runtime.interleave import Frame
from cosyq.runtime.schedule import chunk_ends, shown_prompt
from cosyq.runtime.speed import FASTEST, SLOWEST, Pace
from cosyq.text import arriving
from cosyq.text.prompt import compose, compose_prompt
from cosyq.voices.voice import Voice, load_voice

MIN_SPEECH_PER_TEXT, MAX_SPEECH_PER_TEXT = 2, 20  # speech tokens per text token, the original's bounds
MAX_SEED = 2**63 - 1
PARAGRAPH_PAUSE = 0.4  # seconds
SILENCE = np.empty(0, np.float32)
NEUTRAL = "neutral"  # the voice of an artifact without voices: no speaker vector, the flow's average


@dataclass(frozen=True)
class Timings:
    """Seconds and counts of one request. For a chunk of a stream, of everything up to it."""

    load_seconds: float
    first_audio_seconds: float
    total_seconds: float
    audio_seconds: float
    text_tokens: int
    speech_tokens: int
    token_seconds: float  # spent in the language model
    finish: str  # "stop", "length", or "" while it goes on
    waited_seconds: float = 0.0  # for text that was still being written, a part of the first two

    @property
    def real_time_factor(self) -> float:
        return (self.total_seconds - self.waited_seconds) / self.audio_seconds if self.audio_seconds else 0.0

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
    """A whole request, one utterance of it, or a chunk of one.

    samples: [n] float32 in -1..1.
    seed: the request's.
    text: what the utterance says; of a text that was still being written, as much of it as was read.
    utterance: its number in the request.
    pause: how many of the samples, at their end, are the silence after a paragraph.
    """

    samples: NDArray[np.float32]
    sample_rate: int
    seed: int
    timings: Timings
    text: str = ""
    utterance: int = 0
    pause: int = 0


@dataclass(frozen=True)
class _Manner:
    """How a request is to be spoken: its options, checked."""

    voice: Voice
    transcript: str
    instruction: str
    normalized: bool
    steps: int
    speed: float
    seed: int

    def nth_seed(self, utterance: int) -> int:
        return (self.seed + utterance) % (MAX_SEED + 1)


@dataclass(frozen=True)
class _Utterance:
    """One utterance, checked, before any network runs."""

    said: str
    text: list[int]
    words: int
    prompt_speech: list[int]
    minimum: int
    maximum: int
    pause: int  # samples of silence after it
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
        samples, said = np.concatenate([part.samples for part in parts]), " ".join(part.text for part in parts)
        return replace(parts[-1], samples=samples, text=said, utterance=0)

    def utterances(self, text: str, **options: Unpack[Options]) -> Iterator[Audio]:
        """Speak `text` utterance by utterance, about a sentence or two each; options and errors as in `synthesize`.

        The flow attends to the whole of each. Memory does not grow with the text.
        """
        manner = self._manner(options)
        return self._utterances(self._prepare(text, manner), manner)

    def _utterances(self, utterances: list[_Utterance], manner: _Manner) -> Iterator[Audio]:
        clock = self._clock(manner, sum(u.words for u in utterances))
        for index, utterance in enumerate(utterances):
            tokens = list(self._speech(utterance, clock))
            samples = self._render(tokens, manner)
            yield clock.audio(samples, utterance.said, index, pause=utterance.pause)

    def convert(self, tokens: list[int], *, voice: str | Voice | None = None, steps: int | None = None) -> Audio:
        """Say the speech ids of a recording (`voices.enrol.Encoders`) in another voice.

        Raises:
            UsageError: there is nothing to say, or it is too long beside the voice's prompt.
        """
        manner, count = self._manner({"voice": voice, "steps": steps, "seed": 0}), len(tokens)
        room = self._room(manner.voice)
        if not 0 < count <= room:
            raise UsageError(f"{count} speech tokens cannot be converted (1 to {room})")
        return self._clock(manner).audio(self._render(tokens, manner))

    def _render(self, tokens: list[int], manner: _Manner) -> NDArray[np.float32]:
        mel = self.engine.mel(tokens, manner.voice, streaming=False, final=True, steps=manner.steps)
        return self.engine.samples(Pace(manner.speed).frames(mel), StreamState(), final=True).numpy()

    def stream(self, text: str, **options: Unpack[Options]) -> Iterator[Audio]:
        """Speak `text` chunk by chunk; options and errors as in `synthesize`.

        The chunks of an utterance together equal one block-causal pass over it. Everything is checked before the
        generator is returned; closing it stops the work.
        """
        manner = self._manner(options)
        return self._stream(self._prepare(text, manner), manner)

    def _stream(self, utterances: list[_Utterance], manner: _Manner) -> Iterator[Audio]:
        clock = self._clock(manner, sum(u.words for u in utterances))
        for index, utterance in enumerate(utterances):
            for samples in self._chunks(self._speech(utterance, clock), manner):
                yield clock.audio(samples, utterance.said, index)
            if utterance.pause:
                yield clock.audio(SILENCE, utterance.said, index, pause=utterance.pause)

    def stream_text(self, pieces: Iterable[str], **options: Unpack[Options]) -> Iterator[Audio]:
        """Speak a text that is still being written, chunk by chunk, as soon as there is enough of it.

        Text and speech take turns in the language model, five ids to fifteen. A sentence that ends after some eighty
        ids, or a blank line, ends an utterance. The audio depends on the text and the seed, not on the pieces. It is
        not that of `stream`, whose language model sees each sentence whole.

        Args:
            pieces: the text in order, cut anyhow; asked for more, in this thread, when speech cannot go on without.

        Raises:
            UsageError: an option is not usable: before the generator is returned. The text is not: when it came.
            DeviceError: the device ran out of memory or of finite numbers.
        """
        manner = self._manner(options)
        head, transcript = compose_prompt(manner.transcript, self._tokenizer, instruction=manner.instruction)
        longest, room = arriving.LONGEST_ARRIVING, self._room(manner.voice)
        frame = Frame(
            head=head,
            transcript=transcript,
            prompt=manner.voice.prompt_tokens.tolist() if transcript else [],
            longest=longest,
            least=MIN_SPEECH_PER_TEXT,
            most=MAX_SPEECH_PER_TEXT,
            room=min(room, MAX_SPEECH_PER_TEXT * longest),
        )
        if not frame.fits():  # the rest of the transcript would be spoken
            frame = replace(frame, transcript=[], prompt=[])
        return self._stream_text(pieces, frame, manner)

    def _stream_text(self, pieces: Iterable[str], frame: Frame, manner: _Manner) -> Iterator[Audio]:
        clock = self._clock(manner)
        before = None
        said = arriving.utterances(clock.waiting(pieces), self._tokenizer.encode, normalized=manner.normalized)
        for index, utterance in enumerate(said):
            if before is not None and before.ends_paragraph:
                yield clock.audio(SILENCE, before.text, index - 1, pause=self._pause)
            generator = torch.Generator().manual_seed(manner.nth_seed(index))
            drawn = self.engine.interleaved_tokens(frame, clock.reading(utterance), generator=generator)
            for samples in self._chunks(self._shortened(drawn, clock), manner):
                yield clock.audio(samples, utterance.text, index)
            before = utterance

    def _chunks(self, tokens: Iterator[int], manner: _Manner) -> Iterator[NDArray[np.float32]]:
        """Render an utterance's speech ids as they come."""
        flow, state, pace = self.engine.config.flow, StreamState(), Pace(manner.speed)
        voice, block = manner.voice, flow.chunk_frames // flow.token_mel_ratio
        voice = voice.ending(shown_prompt(voice.prompt_tokens.numel(), block))
        so_far: list[int] = []
        sent = 0  # frames of the flow that were passed on
        ends = chunk_ends(voice.prompt_tokens.numel(), block)
        end = next(ends)
        for token in tokens:
            so_far.append(token)
            if len(so_far) == end + flow.lookahead:
                mel = self.engine.mel(so_far, voice, streaming=True, final=False, steps=manner.steps)
                samples = self.engine.samples(pace.frames(mel[:, sent:]), state, final=False).numpy()
                sent, end = mel.shape[1], next(ends)
                if len(samples):
                    yield samples
        mel = self.engine.mel(so_far, voice, streaming=True, final=True, steps=manner.steps)
        yield self.engine.samples(pace.frames(mel[:, sent:]), state, final=True).numpy()

    def _speech(self, utterance: _Utterance, clock: _Clock) -> Iterator[int]:
        """The utterance's speech ids as they are drawn, long silences shortened."""
        drawn = self.engine.speech_tokens(
            utterance.text,
            utterance.prompt_speech,
            minimum=utterance.minimum,
            maximum=utterance.maximum,
            generator=torch.Generator().manual_seed(utterance.seed),
        )
        return self._shortened(drawn, clock)

    def _shortened(self, drawn: Iterator[int], clock: _Clock) -> Iterator[int]:
        return shorten_silence(clock.counted(drawn), self.engine.config.llm.silent_tokens)

    def _clock(self, manner: _Manner, text_tokens: int = 0) -> _Clock:
        return _Clock(self.load_seconds, self.sample_rate, manner.seed, text_tokens)

    @property
    def _pause(self) -> int:
        return round(PARAGRAPH_PAUSE * self.sample_rate)

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

    def _manner(self, options: Options) -> _Manner:
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
        instruction, normalized = options.get("instruct") or "", options.get("normalize", True)
        return _Manner(voice, transcript, instruction, normalized, steps, speed, seed)

    def _prepare(self, text: str, manner: _Manner) -> list[_Utterance]:
        prompted = compose(
            text, manner.transcript, self._tokenizer, instruction=manner.instruction, normalized=manner.normalized
        )
        room = self._room(manner.voice)
        return [
            _Utterance(
                said=item.text,
                text=item.prompt + item.words,
                words=len(item.words),
                prompt_speech=manner.voice.prompt_tokens.tolist() if item.with_speech else [],
                minimum=min(MIN_SPEECH_PER_TEXT * len(item.words), room),
                maximum=min(MAX_SPEECH_PER_TEXT * len(item.words), room),
                pause=self._pause if item.ends_paragraph and item is not prompted[-1] else 0,
                seed=manner.nth_seed(index),
            )
            for index, item in enumerate(prompted)
        ]


class _Clock:
    """Times one request, over all its utterances, and makes its audio of samples."""

    def __init__(self, load_seconds: float, sample_rate: int, seed: int, text_tokens: int = 0):
        self._sample_rate, self._seed = sample_rate, seed  # the request's own seed: what reproduces it
        self._start = time.perf_counter()
        self._base = Timings(load_seconds, 0.0, 0.0, 0.0, text_tokens, 0, 0.0, "")

    def waiting(self, pieces: Iterable[str]) -> Iterator[str]:
        """Pass the pieces of a text on, timing how long they take to come."""
        arriving = iter(pieces)
        while True:
            started = time.perf_counter()
            try:
                piece = next(arriving)
            except StopIteration:
                return
            finally:
                waited = self._base.waited_seconds + time.perf_counter() - started
                self._base = replace(self._base, waited_seconds=waited)
            yield piece

    def reading(self, text: Iterable[int]) -> Iterator[int]:
        """Pass text ids on, counting them."""
        for token in text:
            self._base = replace(self._base, text_tokens=self._base.text_tokens + 1)
            yield token

    def counted(self, tokens: Iterator[int]) -> Iterator[int]:
        """Pass the language model's tokens on, counting them and its time, and keep how it ended."""
        while True:
            started, waited = time.perf_counter(), self._base.waited_seconds
            try:
                token = next(tokens)
            except StopIteration as stop:
                if self._base.finish != "length":  # one that was cut is worth knowing of
                    self._base = replace(self._base, finish=stop.value)
                return
            spent = time.perf_counter() - started - (self._base.waited_seconds - waited)
            count, seconds = self._base.speech_tokens + 1, self._base.token_seconds + spent
            self._base = replace(self._base, speech_tokens=count, token_seconds=seconds)
            yield token

    def audio(self, samples: NDArray[np.float32], text: str = "", utterance: int = 0, *, pause: int = 0) -> Audio:
        """More samples of the request, with a pause after them and the timings now that they were made."""
        samples = np.pad(samples, (0, pause))
        now = time.perf_counter() - self._start
        first = self._base.first_audio_seconds or now
        seconds = self._base.audio_seconds + len(samples) / self._sample_rate
        self._base = replace(self._base, first_audio_seconds=first, total_seconds=now, audio_seconds=seconds)
        return Audio(samples, self._sample_rate, self._seed, self._base, text, utterance, pause)


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
