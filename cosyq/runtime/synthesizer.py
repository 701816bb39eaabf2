"""Text and a voice in, audio out: the library's front door.

tts = load("artifacts/fun-cosyvoice3-0.5b-int8")
audio = tts.synthesize("Hello.", voice="default", seed=7)
for chunk in tts.stream("A longer text.", voice="default"): ...
for chunk in tts.stream_text(chatbot.tokens(), voice="default"): ...
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from cosyq.artifact.reader import Artifact, open_artifact
from cosyq.errors import UsageError
from cosyq.kernels.start import begin_kernels
from cosyq.model.vocoder import StreamState
from cosyq.runtime.clock import SILENCE, Audio, Clock
from cosyq.runtime.cpu import CpuEngine
from cosyq.runtime.decode import Silence
from cosyq.runtime.engine import Chunk, Engine, EngineChoice, TorchEngine, pick_device, pick_dtype, pick_engine
from cosyq.runtime.interleave import Frame
from cosyq.runtime.rendering import Rendering
from cosyq.runtime.request import Manner, Options, Requests, Utterance, find_voice, voice_names
from cosyq.runtime.speed import Pace
from cosyq.voices.voice import Voice


class Synthesizer:
    """An artifact, loaded into an engine. Requests share nothing but the weights."""

    def __init__(self, artifact: Artifact, engine: Engine, load_seconds: float = 0.0):
        self.artifact, self.engine, self.load_seconds = artifact, engine, load_seconds
        self.requests = Requests(artifact)

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
        manner = self.requests.manner(options)
        return self.whole(self.requests.utterances(text, manner), manner)

    def whole(self, utterances: list[Utterance], manner: Manner) -> Audio:
        """Speak utterances that `requests` made, and return them as one."""
        parts = list(self._utterances(utterances, manner))
        samples, said = np.concatenate([part.samples for part in parts]), " ".join(part.text for part in parts)
        return replace(parts[-1], samples=samples, text=said, utterance=0)

    def utterances(self, text: str, **options: Unpack[Options]) -> Iterator[Audio]:
        """Speak `text` utterance by utterance, about a sentence or two each; options and errors as in `synthesize`.

        The flow attends to the whole of each. Memory does not grow with the text.
        """
        manner = self.requests.manner(options)
        return self._utterances(self.requests.utterances(text, manner), manner)

    def _utterances(self, utterances: list[Utterance], manner: Manner) -> Iterator[Audio]:
        clock = self.clock(manner, sum(u.words for u in utterances))
        for index, utterance in enumerate(utterances):
            drawn = self._speech(utterance, manner.generator(index), clock)
            tokens = list(filter(Silence(self.engine.config.llm.silent_tokens).lets_through, drawn))
            samples = self._render(tokens, manner)
            yield clock.audio(samples, utterance.said, index, pause=utterance.pause)

    def convert(self, tokens: list[int], *, voice: str | Voice | None = None, steps: int | None = None) -> Audio:
        """Say the speech ids of a recording (`voices.enrol.Encoders`) in another voice.

        Raises:
            UsageError: there is nothing to say, or it is too long beside the voice's prompt.
        """
        manner, count = self.requests.manner({"voice": voice, "steps": steps, "seed": 0}), len(tokens)
        room = self.requests.room(manner.voice)
        if not 0 < count <= room:
            raise UsageError(f"{count} speech tokens cannot be converted (1 to {room})")
        return self.clock(manner).audio(self._render(tokens, manner))

    def _render(self, tokens: list[int], manner: Manner) -> NDArray[np.float32]:
        (mel,) = self.engine.mels([Chunk(tokens, manner.voice, False, True, manner.steps)])
        return self.engine.samples(Pace(manner.speed).frames(mel), StreamState(), final=True).numpy()

    def stream(self, text: str, **options: Unpack[Options]) -> Iterator[Audio]:
        """Speak `text` chunk by chunk; options and errors as in `synthesize`.

        The chunks of an utterance together equal one block-causal pass over it. Everything is checked before the
        generator is returned; closing it stops the work.
        """
        manner = self.requests.manner(options)
        return self._stream(self.requests.utterances(text, manner), manner)

    def _stream(self, utterances: list[Utterance], manner: Manner) -> Iterator[Audio]:
        clock = self.clock(manner, sum(u.words for u in utterances))
        for index, utterance in enumerate(utterances):
            for samples in self._chunks(self._speech(utterance, manner.generator(index), clock), manner):
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
        manner = self.requests.manner(options)
        return self._stream_text(pieces, self.requests.frame(manner), manner)

    def _stream_text(self, pieces: Iterable[str], frame: Frame, manner: Manner) -> Iterator[Audio]:
        clock = self.clock(manner)
        before = None
        for index, utterance in enumerate(self.requests.arriving(clock.waiting(pieces), manner)):
            if before is not None and before.ends_paragraph:
                yield clock.audio(SILENCE, before.text, index - 1, pause=self.requests.pause)
            parts = self.requests.parts(frame, clock.reading(utterance))
            drawn = self.engine.speech_tokens(
                parts, positions=frame.positions, room=frame.room, generator=manner.generator(index)
            )
            for samples in self._chunks(clock.counted(drawn), manner):
                yield clock.audio(samples, utterance.text, index)
            before = utterance

    def _chunks(self, tokens: Iterator[int], manner: Manner) -> Iterator[NDArray[np.float32]]:
        """Render an utterance's speech ids as they come."""
        rendering = self.rendering(manner)
        for token in tokens:
            rendering.add([token])
            if rendering.due is not None and len(samples := rendering.next()):
                yield samples
        rendering.end()
        yield rendering.next()

    def _speech(self, utterance: Utterance, generator: torch.Generator, clock: Clock) -> Iterator[int]:
        """The utterance's speech ids as they are drawn."""
        part = utterance.part
        drawn = self.engine.speech_tokens([part], positions=part.positions, room=part.maximum, generator=generator)
        return clock.counted(drawn)

    def rendering(self, manner: Manner) -> Rendering:
        """For the speech ids of an utterance."""
        return Rendering(self.engine, manner.voice, steps=manner.steps, speed=manner.speed)

    def clock(self, manner: Manner, text_tokens: int = 0) -> Clock:
        return Clock(self.load_seconds, self.sample_rate, manner.seed, text_tokens)


def load(
    artifact: str | Path | Artifact, *, device: str = "auto", dtype: str = "auto", engine: EngineChoice = "auto"
) -> Synthesizer:
    """Open an artifact and put it on a device.

    Args:
        artifact: a folder, or an artifact that was opened already.
        device: auto, cpu, cuda or cuda:N.
        dtype: what matrix products are computed in: auto, bf16, fp16 or fp32.
        engine: auto, `fused`, `fused8`, `cpu`, `reference`, `unpacked` or `bnb`; see `runtime.engine`.

    Raises:
        ArtifactError: it is missing, damaged or too new.
        DeviceError: the device is missing or too small.
    """
    started = time.perf_counter()
    opened = artifact if isinstance(artifact, Artifact) else open_artifact(Path(artifact))
    place = pick_device(device)
    name, arithmetic = pick_engine(engine, place), pick_dtype(dtype, place)
    if name in ("fused", "fused8"):
        begin_kernels(place, arithmetic)  # beside the import
        from cosyq.runtime.fused import FusedEngine

        return Synthesizer(opened, FusedEngine(opened, name, place, arithmetic), time.perf_counter() - started)
    kind = CpuEngine if name == "cpu" else TorchEngine
    return Synthesizer(opened, kind(opened, name, place, arithmetic), time.perf_counter() - started)
