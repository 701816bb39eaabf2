"""The speaker behind the server, and whether it may be asked: loading, ready, draining or dead."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import cycle
from typing import Literal

from cosyq.errors import CosyqError
from cosyq.server.logs import event, log
from cosyq.server.metrics import Metrics
from cosyq.server.schemas import VOICE_ALIASES
from cosyq.server.settings import Settings
from cosyq.server.speaker import Speaker, Speech, SpeechRequest, Stats, UnavailableError

Loader = Callable[[Callable[[CosyqError], None]], Speaker]  # given what to call when the device fails for good
Phase = Literal["loading", "ready", "draining", "dead"]


class Service:
    """One speaker and all that is spoken with it.

    error: why it is dead.
    responses: how many requests are being answered, audio included that was made already.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.phase: Phase = "loading"
        self.error: BaseException | None = None
        self.responses = 0
        self._settled = asyncio.Event()  # it is loading no more
        self.metrics = Metrics(self.stats)
        self._loader: threading.Thread | None = None
        self._speaker: Speaker | None = None
        self._first_voices: list[str] = []
        self._speeches: dict[Speech, asyncio.Task[None]] = {}

    # ---- its life

    def load(self, loader: Loader) -> None:
        """Make the speaker in a thread; call it in the event loop. Until it is there the service is loading."""
        loop = asyncio.get_running_loop()

        def post(call: Callable[..., None], *arguments: object) -> None:
            with suppress(RuntimeError):  # the server has gone meanwhile
                loop.call_soon_threadsafe(call, *arguments)

        def work() -> None:
            try:
                post(self._loaded, loader(lambda error: post(self.died, error)))
            except BaseException as error:  # whatever it is: the server ends with it
                post(self.died, error)

        # A daemon: a signal to stop need not wait for gigabytes.
        self._loader = threading.Thread(target=work, name="loader", daemon=True)
        self._loader.start()

    @property
    def loads(self) -> bool:
        """Whether that thread is at it still."""
        return self._loader is not None and self._loader.is_alive()

    def _loaded(self, speaker: Speaker) -> None:
        self._speaker, self._first_voices = speaker, speaker.voices()
        if self.phase == "loading":
            self.phase = "ready"
            event("ready", **speaker.about(), voices=len(speaker.voices()), memory_bytes=speaker.stats().memory_bytes)
        self._settled.set()

    async def loaded(self) -> None:
        """Wait while it is loading. Raises what it has died of, then or later."""
        await self._settled.wait()
        if self.error is not None:
            raise self.error

    def drain(self) -> None:
        """Take nothing more; what is spoken goes on."""
        if self.phase in ("loading", "ready"):
            self.phase = "draining"
            event("draining", responses=self.responses)

    def cut(self, reason: str) -> None:
        """End everything now, visibly."""
        for speech in list(self._speeches):
            speech.end(UnavailableError(reason))
            speech.cancel()

    def died(self, error: BaseException) -> None:
        self.phase, self.error = "dead", error
        self._settled.set()
        log.error("dead", extra={"fields": {"error": str(error)}})
        self.cut("the device has failed")

    def close(self) -> None:
        if self._speaker is not None:
            self._speaker.close()

    # ---- what it is asked

    @property
    def speaker(self) -> Speaker:
        """Raises UnavailableError while there is none."""
        if self._speaker is None:
            raise UnavailableError(f"the model is {self.phase}")
        return self._speaker

    def stats(self) -> Stats | None:
        return self._speaker.stats() if self._speaker is not None else None

    def require_ready(self) -> None:
        """Raises UnavailableError unless it is."""
        if self.phase != "ready":
            raise UnavailableError(f"the server is {self.phase}")

    def submit(self, request: SpeechRequest) -> Speech:
        """Queue a request.

        Raises:
            BusyError: too many wait.
            UnavailableError: it is not ready.
        """
        try:
            self.require_ready()
            speech = self.speaker.submit(request)
        except CosyqError:
            self.metrics.requests.labels("rejected").inc()
            raise
        self._speeches[speech] = asyncio.create_task(self._follow(speech))
        return speech

    async def _follow(self, speech: Speech) -> None:
        await speech.released.wait()
        del self._speeches[speech]
        self.metrics.released(speech)

    def voice_aliases(self) -> dict[str, str]:
        """OpenAI's voice names, each with the voice that answers to it: those there were at the start, in turn.

        One that is added moves none of them.
        """
        names = self.speaker.voices()
        first = [name for name in self._first_voices if name in names] or names
        return {alias: name for alias, name in zip(VOICE_ALIASES, cycle(first), strict=False) if alias not in names}

    def find_voice(self, name: str) -> str | None:
        """The speaker's name of a voice, or None."""
        return name if name in self.speaker.voices() else self.voice_aliases().get(name)
