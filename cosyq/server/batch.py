"""A speaker over an engine that speaks several requests at once, and that can be let go of while nobody asks."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cosyq.artifact.edit import put_voice, remove_voice
from cosyq.artifact.reader import Artifact
from cosyq.audio.recording import read_recording
from cosyq.errors import ArtifactError, CosyqError, UsageError
from cosyq.runtime.clock import Audio
from cosyq.runtime.engine import pick_device
from cosyq.runtime.flight import GoneError
from cosyq.runtime.inflight import InFlight, rows_for
from cosyq.runtime.request import voice_names
from cosyq.runtime.synthesizer import Synthesizer, load
from cosyq.server.speaker import BusyError, Chunk, Speech, SpeechRequest, Stats, UnavailableError
from cosyq.voices.enrol import Encoders, check_take, enrol

CPU = torch.device("cpu")
WARM_UP = "Hello there."
SHARE = 0.3  # of the newest request in the running mean
LOOKS = 10  # at whether it is idle, in the time after which it is

log = logging.getLogger("cosyq.server")


class BatchSpeaker:
    """Speaks what is submitted, several at once.

    Args:
        load: makes what speaks, on `device`; its engine is then this object's.
        rows: how many requests at once; None is `rows_for`'s choice.
        longest_queue: how many more may wait.
        idle: seconds without a request after which the engine is let go of, until the next one; None is never.
        encoders: the folder of those that make a voice of a recording, or None.
        on_fatal: called from another thread, once, when the device has failed for good.

    Raises:
        CosyqError: it cannot speak: making one says a word.
    """

    def __init__(
        self,
        load: Callable[[], Synthesizer],
        *,
        rows: int | None = None,
        longest_queue: int,
        on_fatal: Callable[[CosyqError], None],
        device: torch.device = CPU,
        idle: float | None = None,
        encoders: Path | None = None,
    ):
        self._load, self._wanted, self._longest, self._idle = load, rows, longest_queue, idle
        self._on_fatal, self._device, self._encoders = on_fatal, device, encoders
        self._editing, self._lock = threading.Lock(), threading.Lock()
        self._loading = threading.Lock()  # one engine at a time comes or goes: two might not fit
        self._closed = threading.Event()
        self._waking: list[Speech] | None = None  # those that wait for the engine to be loaded again
        self._seconds = 1.0  # of a request, a running mean
        self._used = time.monotonic()
        self._log_memory("start")
        self._engine: InFlight | None = self._start()
        tts = self._engine.tts
        self.artifact, self.sample_rate = tts.artifact, tts.sample_rate
        if idle is not None:
            threading.Thread(target=self._watch, args=(idle,), name="idle", daemon=True).start()

    def _start(self) -> InFlight:
        started = time.perf_counter()
        tts = self._load()
        engine = tts.engine
        self._log_memory("loaded", **{f"{stage}_bytes": count for stage, count in engine.weights.items()})
        rows = rows_for(engine) if self._wanted is None else self._wanted
        made = InFlight(tts, rows=rows, on_fatal=self._on_fatal)
        try:
            made.warm_up(WARM_UP)
        except BaseException:
            made.close()
            raise
        self._rows = rows
        self._about: dict[str, Any] = {
            "artifact": tts.artifact.manifest.name,
            "quantization": {s: o["weights"] for s, o in tts.artifact.manifest.recipe["stages"].items()},
            "engine": engine.name,
            "device": str(self._device),
            "max_concurrency": rows,
            "load_seconds": round(time.perf_counter() - started, 3),
        }
        self._log_memory("ready", max_concurrency=rows, load_seconds=self._about["load_seconds"])
        return made

    def _log_memory(self, when: str, **more: Any) -> None:
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            more |= {"free_bytes": free, "total_bytes": total, "reserved_bytes": device_memory(self._device)}
        log.info("memory", extra={"fields": {"at": when, **more}})

    # ---- what it is asked

    def voices(self) -> list[str]:
        return sorted(voice_names(self.artifact), key=lambda name: name != "default")

    def about(self) -> dict[str, Any]:
        return {**self._about, "loaded": self._engine is not None}

    def submit(self, request: SpeechRequest) -> Speech:
        with self._lock:
            if self._closed.is_set():
                raise UnavailableError("the speaker has stopped")
            waiting, active = self._counts()
            if waiting + active >= self._longest + self._rows:
                raise BusyError(f"{self._longest} requests are waiting", retry_after=self._retry_after())
            self._used = time.monotonic()
            speech = Speech(request, self._look)
            if self._engine is not None:
                self._hand_over(self._engine, speech)
            elif self._waking is not None:
                self._waking.append(speech)
            else:
                self._waking = [speech]
                threading.Thread(target=self._wake, name="loader", daemon=True).start()
        return speech

    def _hand_over(self, engine: InFlight, speech: Speech) -> None:
        request = speech.request
        try:
            engine.submit(
                request.text,
                _Ear(speech, self._ended),
                longest=request.longest_seconds,
                voice=request.voice,
                seed=request.seed,
                speed=request.speed,
                instruct=request.instruct,
                normalize=request.normalize,
            )
        except GoneError as error:
            raise UnavailableError(error.what) from None

    def _ended(self, seconds: float) -> None:
        """A request was spoken for so long."""
        self._seconds += SHARE * (seconds - self._seconds)
        self._used = time.monotonic()

    def _look(self) -> None:
        """Somebody has left."""
        with self._lock:
            if self._engine is not None:
                self._engine.wake()
            for speech in [s for s in self._waking or () if s.cancelled]:
                assert self._waking is not None
                self._waking.remove(speech)
                _refuse(speech, UnavailableError("the speech was stopped"))

    def stats(self) -> Stats:
        with self._lock:
            return Stats(*self._counts(), self._retry_after(), device_memory(self._device))

    def _counts(self) -> tuple[int, int]:
        """Waiting and active requests."""
        if self._engine is None:
            return len(self._waking or ()), 0
        return self._engine.waiting, self._engine.active

    def _retry_after(self) -> float:
        """Seconds until the next of those that wait begins to be spoken."""
        return min(max(self._seconds / self._rows, 0.1), 60.0)

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            engine, waking = self._engine, self._waking or []
            self._waking = None
        if engine is not None:
            engine.close()
        for speech in waking:
            _refuse(speech, UnavailableError("the speaker has stopped"))

    # ---- while nobody asks

    def _watch(self, idle: float) -> None:
        while not self._closed.wait(idle / LOOKS):
            with self._loading:
                with self._lock:
                    quiet = time.monotonic() - self._used > idle and self._counts() == (0, 0)
                    engine = self._engine if quiet else None
                    if engine is None:
                        continue
                    self._engine = None
                engine.close()
                del engine
                gc.collect()
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                self._log_memory("unloaded", idle_seconds=idle)

    def _wake(self) -> None:
        """Load again, for those that have asked meanwhile."""
        error: CosyqError | None = None
        engine = None
        try:
            with self._loading:
                engine = self._start()
        except CosyqError as raised:
            error = raised
        except Exception as raised:
            log.exception("loading failed")
            error = UnavailableError(f"the model cannot be loaded again ({type(raised).__name__})")
        with self._lock:
            speeches, self._waking = self._waking or [], None
            self._engine = None if self._closed.is_set() else engine
            for speech in speeches:
                if self._engine is None:
                    _refuse(speech, error or UnavailableError("the speaker has stopped"))
                else:
                    self._hand_over(self._engine, speech)
        if engine is not None and self._closed.is_set():
            engine.close()

    # ---- voices

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


def load_speaker(
    artifact: Artifact, place: Mapping[str, Any], *, on_fatal: Callable[[CosyqError], None], **options: Any
) -> BatchSpeaker:
    """A speaker of an artifact. `place` is what `runtime.synthesizer.load` is told, `options` what BatchSpeaker is.

    Raises:
        CosyqError: as BatchSpeaker.
    """
    device = pick_device(place["device"])
    return BatchSpeaker(lambda: load(artifact, **place), device=device, on_fatal=on_fatal, **options)


class _Ear:
    """Passes on to a client what an engine says to it."""

    def __init__(self, speech: Speech, ended: Callable[[float], None]):
        self._speech, self._ended = speech, ended
        self.begin, self.release = speech.begin, speech.release

    @property
    def cancelled(self) -> bool:
        return self._speech.cancelled

    def put(self, audio: Audio) -> None:
        t = audio.timings
        said = (audio.utterance, audio.text, audio.pause)
        self._speech.put(Chunk(audio.samples, t.text_tokens, t.speech_tokens, t.finish, *said))

    def end(self, error: CosyqError | None) -> None:
        if self._speech.began:
            self._ended(time.monotonic() - self._speech.began)
        self._speech.end(UnavailableError(error.what) if isinstance(error, GoneError) else error)


def _refuse(speech: Speech, error: CosyqError) -> None:
    speech.end(error)
    speech.release()


def device_memory(device: torch.device) -> int:
    """Bytes that torch holds on a GPU; of the host, 0."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
