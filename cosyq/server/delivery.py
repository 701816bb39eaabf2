"""One speech on its way to one client: awaited, encoded, sent, and let go of as soon as it is not wanted.

Nothing is answered before the first audio is there; what fails later breaks the stream, or is told as an event.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import asdict, dataclass
from typing import Any

from starlette.responses import StreamingResponse

from cosyq.errors import CosyqError
from cosyq.server.encoders import Encoder
from cosyq.server.failures import failure_of
from cosyq.server.gate import BrokenStreamError
from cosyq.server.logs import log
from cosyq.server.service import Service
from cosyq.server.speaker import BusyError, Chunk, DeadlineError, Speech

GRACE = 1.0  # seconds after the deadline for telling so


class ClientGoneError(Exception):
    """Nobody waits for the answer."""


@dataclass(frozen=True)
class Segment:
    """An utterance, and when it begins and ends in the audio that is sent, in seconds."""

    text: str
    start: float
    end: float


class Delivery:
    """Of `speech`, by `encoder`, whose seconds are those of the speaker divided by `tempo`.

    Args:
        fields: where to note what is to be logged.
    """

    def __init__(self, service: Service, fields: dict[str, Any], speech: Speech, encoder: Encoder, tempo: float):
        self._service, self._fields, self._speech, self._encoder = service, fields, speech, encoder
        self._metrics, self._rate = service.metrics, service.speaker.sample_rate * tempo
        self._deadline = speech.accepted + service.settings.deadline_seconds
        self._samples = 0
        self._segments: list[Segment] = []
        self._utterance = 0  # of the last segment
        self._last: Chunk | None = None
        self._head = b""
        self._outcome = "cancelled"  # until something else is known

    async def begin(self, gone: Coroutine[Any, Any, Any]) -> None:
        """Wait for the first audio, as long as the client does: until `gone` returns.

        Raises:
            CosyqError: there will be none.
            ClientGoneError: the client has left.
        """
        try:
            self._head = await self._while_wanted(self._first(), gone)
        except BaseException as error:
            if isinstance(error, BusyError):
                self._outcome = "rejected"
            elif isinstance(error, Exception) and not isinstance(error, ClientGoneError):
                self._outcome = "failed"
            self.end()
            raise

    def response(self, media_type: str, *, events: bool, timestamps: bool) -> StreamingResponse:
        headers = {"cache-control": "no-store", "x-seed": str(self._speech.request.seed)}
        if events:
            return _Response(self, self._events(timestamps), "text/event-stream", headers)
        return _Response(self, self.audio(), media_type, headers)

    @property
    def deadline(self) -> float:
        return self._deadline

    def end(self) -> None:
        """It is over, one way or another: stop the work, count and note how it went. Only the first call counts."""
        if self._speech.cancelled:
            return
        self._speech.cancel()
        self._metrics.requests.labels(self._outcome).inc()
        seconds = self._samples / self._service.speaker.sample_rate
        self._metrics.audio.inc(seconds)
        speech, work = self._speech, (self._speech.ended or time.monotonic()) - self._speech.began
        self._fields |= {"outcome": self._outcome, "audio_seconds": round(seconds, 3)}
        if speech.began:
            self._fields |= {"wait_seconds": round(speech.began - speech.accepted, 4)}
        if self._outcome in ("ok", "cut") and seconds:
            self._metrics.factor.observe(work / seconds)
            self._fields |= {"real_time_factor": round(work / seconds, 4)}

    # ---- up to the first audio

    async def _first(self) -> bytes:
        speech, wait = self._speech, self._service.settings.wait_seconds
        try:
            await asyncio.wait_for(speech.started.wait(), wait)
        except TimeoutError:
            stats = self._service.speaker.stats()
            raise BusyError(f"waited {wait:g} seconds in the queue", retry_after=stats.retry_after) from None
        if speech.began:
            self._metrics.wait.observe(speech.began - speech.accepted)
        while (chunk := await self._next()) is not None:
            if len(chunk.samples):
                self._metrics.first_audio.observe(time.monotonic() - speech.accepted)
                self._fields["first_audio_seconds"] = round(time.monotonic() - speech.accepted, 4)
                return await self._encoded(chunk)
        raise CosyqError("no audio came of it")

    async def _while_wanted(self, work: Coroutine[Any, Any, bytes], gone: Coroutine[Any, Any, Any]) -> bytes:
        task, left = asyncio.ensure_future(work), asyncio.ensure_future(gone)
        try:
            await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGoneError
            return task.result()
        finally:
            task.cancel()
            left.cancel()

    async def _next(self) -> Chunk | None:
        """The next chunk, or None after the last.

        Raises:
            DeadlineError: it is not there in time.
            CosyqError: it will not come.
        """
        try:
            async with asyncio.timeout_at(self._deadline):
                chunk = await anext(self._speech, None)
        except TimeoutError:
            seconds = self._service.settings.deadline_seconds
            raise DeadlineError(f"not done in {seconds:g} seconds", remedy="give a shorter text") from None
        if chunk is not None:
            self._last = chunk
            self._note(chunk)
        return chunk

    async def _encoded(self, chunk: Chunk) -> bytes:
        """Each change of threads waits for Python's lock, which whoever computes gives up late."""
        encode = self._encoder.encode
        return encode(chunk.samples) if self._encoder.light else await asyncio.to_thread(encode, chunk.samples)

    def _note(self, chunk: Chunk) -> None:
        start, self._samples = self._samples, self._samples + len(chunk.samples)
        end = round((self._samples - chunk.pause) / self._rate, 3)
        if self._segments and chunk.utterance == self._utterance:
            start_seconds = self._segments.pop().start
        else:
            start_seconds, self._utterance = round(start / self._rate, 3), chunk.utterance
        self._segments.append(Segment(chunk.text, start_seconds, end))

    # ---- and from there

    async def audio(self) -> AsyncIterator[bytes]:
        """All of it, encoded, as it is made; errors as of `begin`."""
        try:
            if self._head:
                yield self._head
            while (chunk := await self._next()) is not None:
                if data := await self._encoded(chunk):
                    yield data
            finish = self._encoder.finish
            if data := finish() if self._encoder.light else await asyncio.to_thread(finish):
                yield data
            self._outcome = "cut" if self._last and self._last.finish == "length" else "ok"
        except Exception:
            self._outcome = "failed"
            raise

    def done(self, *, timestamps: bool) -> dict[str, Any]:
        """What to say at the end: what it took, and when what was said."""
        assert self._last is not None
        text, speech = self._last.text_tokens, self._last.speech_tokens
        usage = {"input_tokens": text, "output_tokens": speech, "total_tokens": text + speech}
        segments = {"segments": [asdict(segment) for segment in self._segments]} if timestamps else {}
        return {"type": "speech.audio.done", "usage": usage, **segments}

    async def _events(self, timestamps: bool) -> AsyncIterator[bytes]:
        """The same as server-sent events."""
        try:
            async for data in self.audio():
                yield _event({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode("ascii")})
        except Exception as error:
            yield _event(failed(error))
            # For clients that look for audio alone, and would take an end for the end.
            raise BrokenStreamError(str(error)) from error
        yield _event(self.done(timestamps=timestamps))
        yield b"data: [DONE]\n\n"


def failed(error: Exception) -> dict[str, Any]:
    """What to say where audio was sent already."""
    if not isinstance(error, CosyqError):
        log.exception("delivery failed", exc_info=error)
        error = CosyqError("internal error")
    return {"type": "speech.audio.error", "error": failure_of(error).error()}


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode("ascii") + b"\n\n"


class _Response(StreamingResponse):
    """Ends its delivery whatever happens: a client that leaves, or does not read, or a stream that fails."""

    def __init__(
        self, delivery: Delivery, content: AsyncIterator[bytes], media_type: str, headers: dict[str, str]
    ) -> None:
        super().__init__(content, media_type=media_type, headers=headers)
        self._delivery = delivery

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            async with asyncio.timeout_at(self._delivery.deadline + GRACE):
                await super().__call__(scope, receive, send)
        except (CosyqError, TimeoutError) as error:
            raise BrokenStreamError(str(error)) from error
        finally:
            self._delivery.end()
