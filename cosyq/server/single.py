"""A speaker over today's synthesizer: one thread, one request at a time, first come, first served."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosyq.artifact.edit import put_voice, remove_voice
from cosyq.artifact.reader import Artifact
from cosyq.audio.recording import read_recording
from cosyq.errors import ArtifactError, CosyqError, DeviceError, UsageError
from cosyq.model.vocoder import StreamState
from cosyq.runtime.engine import Engine
from cosyq.runtime.interleave import Frame
from cosyq.runtime.synthesizer import Options, Synthesizer
from cosyq.server.speaker import BusyError, Chunk, Speech, SpeechRequest, Stats, UnavailableError
from cosyq.voices.enrol import Encoders, check_take, enrol
from cosyq.voices.voice import Voice

WARM_UP = "Hello there."
PATIENCE = 5.0  # seconds for the thread to end
SHARE = 0.3  # of the newest request in the running mean

log = logging.getLogger("cosyq.server")


class _StoppedError(Exception):
    """The audio is not wanted any more."""


class _Interruptible:
    """An engine that looks, before each of its steps, whether to go on."""

    def __init__(self, engine: Engine, check: Callable[[], None]):
        self._engine, self._check = engine, check
        self.name, self.config, self.device = engine.name, engine.config, engine.device

    def speech_tokens(
        self, text: list[int], prompt: list[int], *, minimum: int, maximum: int, generator: torch.Generator
    ) -> Iterator[int]:
        return self._checked(
            self._engine.speech_tokens(text, prompt, minimum=minimum, maximum=maximum, generator=generator)
        )

    def interleaved_tokens(self, frame: Frame, text: Iterator[int], *, generator: torch.Generator) -> Iterator[int]:
        return self._checked(self._engine.interleaved_tokens(frame, text, generator=generator))

    def _checked(self, tokens: Iterator[int]) -> Iterator[int]:
        self._check()
        while True:
            try:
                token = next(tokens)
            except StopIteration as stop:
                return stop.value
            self._check()
            yield token

    def mel(self, tokens: list[int], voice: Voice, *, streaming: bool, final: bool, steps: int) -> Tensor:
        self._check()
        return self._engine.mel(tokens, voice, streaming=streaming, final=final, steps=steps)

    def samples(self, mel: Tensor, state: StreamState, *, final: bool) -> Tensor:
        self._check()
        return self._engine.samples(mel, state, final=final)


class SingleSpeaker:
    """Speaks what is submitted, in order.

    Args:
        loaded: what speaks; its engine is asked step by step.
        longest_queue: how many requests may wait.
        encoders: the folder of those that make a voice of a recording, or None.
        on_fatal: called from the speaking thread, once, when the device has failed for good.

    Raises:
        CosyqError: it cannot speak: making one says a word.
    """

    def __init__(
        self,
        loaded: Synthesizer,
        *,
        longest_queue: int,
        on_fatal: Callable[[CosyqError], None],
        encoders: Path | None = None,
    ):
        self.artifact = loaded.artifact
        self._tts = Synthesizer(loaded.artifact, _Interruptible(loaded.engine, self._check), loaded.load_seconds)
        self._longest, self._on_fatal, self._encoders = longest_queue, on_fatal, encoders
        self._editing = threading.Lock()
        self._waiting: deque[Speech] = deque()
        self._current: Speech | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._seconds = 1.0  # of a request, a running mean
        self.sample_rate = self._tts.sample_rate
        for _ in self._tts.stream(WARM_UP, seed=0):
            pass
        self._thread = threading.Thread(target=self._run, name="speaker", daemon=True)
        self._thread.start()

    def voices(self) -> list[str]:
        names = self._tts.voices()
        return sorted(names, key=lambda name: name != "default")

    def about(self) -> dict[str, Any]:
        manifest, engine = self.artifact.manifest, self._tts.engine
        stages = {stage: options["weights"] for stage, options in manifest.recipe["stages"].items()}
        return {
            "artifact": manifest.name,
            "quantization": stages,
            "device": str(engine.device),
            "load_seconds": round(self._tts.load_seconds, 3),
        }

    def submit(self, request: SpeechRequest) -> Speech:
        with self._changed:
            if self._closed:
                raise UnavailableError("the speaker has stopped")
            if len(self._waiting) >= self._longest:
                raise BusyError(f"{self._longest} requests are waiting", retry_after=self._retry_after())
            speech = Speech(request, self._forget_cancelled)
            self._waiting.append(speech)
            self._changed.notify()
        return speech

    def add_voice(self, name: str, audio: Path, transcript: str) -> None:
        if self._encoders is None:
            raise UnavailableError("this server has no encoders to make a voice with", remedy="start it with --source")
        recording = read_recording(audio)
        check_take(name, recording, transcript)
        with self._editing:  # one at a time: the encoders take a gigabyte, which goes again with the request
            if name in self.artifact.voice_files():
                raise UsageError("there is such a voice already", where=name)
            voice = enrol(name, recording, transcript, Encoders(self._encoders), self.artifact.manifest.model.flow)
            self._edit(lambda: put_voice(self.artifact, name, voice.to_bytes()))

    def remove_voice(self, name: str) -> None:
        with self._editing:
            self._edit(lambda: remove_voice(self.artifact, name))

    def _edit(self, change: Callable[[], Artifact]) -> None:
        try:
            self.artifact = change()
        except ArtifactError as error:  # a read-only artifact, a full disk: the paths are not the client's business
            log.error("voices cannot be written", extra={"fields": {"error": str(error)}})
            raise UnavailableError("the server cannot write its voices") from None

    def stats(self) -> Stats:
        with self._changed:
            active = int(self._current is not None)
            return Stats(len(self._waiting), active, self._retry_after(), device_memory(self._tts.engine.device))

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(PATIENCE)

    def _retry_after(self) -> float:
        """Seconds until the next of those that wait begins to be spoken."""
        return min(max(self._seconds, 0.1), 60.0)

    def _forget_cancelled(self) -> None:
        """Those that wait for nobody give up their place."""
        with self._changed:
            for speech in [s for s in self._waiting if s.cancelled]:
                self._waiting.remove(speech)
                speech.release()

    # ---- the speaking thread

    def _check(self) -> None:
        if self._closed or (self._current is not None and self._current.cancelled):
            raise _StoppedError

    def _run(self) -> None:
        while (speech := self._next()) is not None:
            started = time.monotonic()
            error = self._speak(speech)
            with self._changed:
                self._current = None
            speech.end(error)
            speech.release()
            self._seconds += SHARE * (time.monotonic() - started - self._seconds)

    def _next(self) -> Speech | None:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                for speech in self._waiting:
                    speech.end(UnavailableError("the speaker has stopped"))
                    speech.release()
                self._waiting.clear()
                return None
            self._current = self._waiting.popleft()
            return self._current

    def _speak(self, speech: Speech) -> CosyqError | None:
        """Say it all; returns what went wrong, if anything."""
        speech.begin()
        try:
            self._say(speech)
        except _StoppedError:
            return UnavailableError("the speech was stopped")
        except CosyqError as error:
            return error
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return DeviceError("out of memory", where="device", remedy="give a shorter text")
        except Exception as error:
            if _is_fatal(error):
                lost = DeviceError(f"the device has failed ({str(error).splitlines()[0][:160]})", where="device")
                with self._changed:
                    self._closed = True
                self._on_fatal(lost)
                return UnavailableError("the device has failed")
            log.exception("speaking failed")
            return CosyqError(f"internal error: {type(error).__name__}")
        return None

    def _say(self, speech: Speech) -> None:
        request = speech.request
        options: Options = {
            "voice": request.voice,
            "seed": request.seed,
            "speed": request.speed,
            "instruct": request.instruct,
            "normalize": request.normalize,
        }
        left = round(request.longest_seconds * self.sample_rate)
        with closing(self._tts.stream(request.text, **options)) as chunks:  # type: ignore[type-var]
            for audio in chunks:
                self._check()
                samples, cut = audio.samples[:left], len(audio.samples) > left
                left -= len(samples)
                t = audio.timings
                speech.put(Chunk(samples, t.text_tokens, t.speech_tokens, "length" if cut else t.finish))
                if cut:
                    return


def device_memory(device: torch.device) -> int:
    """Bytes that torch holds on a GPU; of the host, 0."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def _is_fatal(error: Exception) -> bool:
    """After an error of CUDA's own the process can do nothing more on the device."""
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
