"""Text in, audio out, over one WebSocket, while the text is still being written.

The client sends JSON: `speech.create` with the fields of a speech request but `input`, any number of
`input_text.append`, and `input_text.done`. It gets `speech.created`, audio as binary messages in the format it asked
for, and `speech.audio.done` with the usage; or `speech.audio.error`, and a close that is no success.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from cosyq.server.asked import check_length, speech_request
from cosyq.server.delivery import GRACE, Delivery, failed
from cosyq.server.encoders import make_encoder
from cosyq.server.failures import RefusedError, refused
from cosyq.server.gate import FIELDS
from cosyq.server.schemas import MORE, START, Append, Kind, M, read_message
from cosyq.server.service import Service
from cosyq.server.speaker import BusyError, DeadlineError, UnavailableError

NORMAL, REFUSED, FAILED, TRY_LATER = 1000, 1008, 1011, 1013  # RFC 6455, section 7.4, and IANA's list


class Conversation:
    """One client's, over `socket`."""

    def __init__(self, service: Service, socket: WebSocket):
        self._service, self._socket = service, socket
        self._fields: dict[str, Any] = socket.scope[FIELDS]
        self._pieces: SimpleQueue[str | None] = SimpleQueue()
        self._characters = 0

    async def hold(self) -> None:
        await self._socket.accept()
        with suppress(WebSocketDisconnect, TimeoutError):
            code, message = await self._outcome()
            async with asyncio.timeout(GRACE):
                if message is not None:
                    await self._socket.send_json(message)
                await self._socket.close(code)

    async def _outcome(self) -> tuple[int, dict[str, Any] | None]:
        """Hold it to its end: what to close with, and what to say of a failure."""
        seconds = self._service.settings.deadline_seconds
        try:
            async with asyncio.timeout(seconds):
                await self._converse()
        except WebSocketDisconnect:
            raise
        except RefusedError as error:
            return REFUSED, {"type": "speech.audio.error", "error": error.failure.error()}
        except (BusyError, UnavailableError) as error:
            return TRY_LATER, failed(error)
        except TimeoutError:
            return FAILED, failed(DeadlineError(f"not done in {seconds:g} seconds"))
        except Exception as error:
            return FAILED, failed(error)
        return NORMAL, None

    async def _converse(self) -> None:
        create = await self._receive(START)
        wanted, tempo = speech_request(create, iter(self._pieces.get, None), self._service)
        await self._socket.send_json({"type": "speech.created", "seed": wanted.seed})
        self._fields |= {"voice": wanted.voice, "format": create.response_format}
        encoder = make_encoder(create.response_format, self._service.speaker.sample_rate, tempo)
        try:
            more = await self._take()  # before there is any, nothing need wait for it
            speech = self._service.submit(wanted)
            delivery = Delivery(self._service, self._fields, speech, encoder, tempo)
            reading = asyncio.create_task(self._read(more))
            speaking = asyncio.create_task(self._speak(delivery, timestamps=create.timestamps))
            try:
                # Reading ends first where the client leaves, or sends what will not do.
                await asyncio.wait({reading, speaking}, return_when=asyncio.FIRST_COMPLETED)
                await (speaking if speaking.done() else reading)
            finally:
                delivery.end()
                for task in (reading, speaking):
                    task.cancel()
                await asyncio.gather(reading, speaking, return_exceptions=True)
        finally:
            self._pieces.put(None)
            self._fields["characters"] = self._characters

    async def _speak(self, delivery: Delivery, *, timestamps: bool) -> None:
        await delivery.begin(asyncio.Event().wait())  # whether the client is there, the reading sees
        async for data in delivery.audio():
            await self._socket.send_bytes(data)
        await self._socket.send_json(delivery.done(timestamps=timestamps))

    async def _read(self, more: bool) -> None:
        """Until the client leaves, which is an error only while it is spoken to."""
        while more:
            more = await self._take()
        self._pieces.put(None)
        while (await self._socket.receive())["type"] != "websocket.disconnect":
            raise refused(400, "nothing may follow input_text.done", param="type", code="invalid_value")
        raise WebSocketDisconnect

    async def _take(self) -> bool:
        """One message of text; whether more may come."""
        message = await self._receive(MORE)
        if isinstance(message, Append):
            self._characters += len(message.text)
            check_length(self._characters, self._service)
            self._service.metrics.characters.inc(len(message.text))
            self._pieces.put(message.text)
        return isinstance(message, Append)

    async def _receive(self, kind: Kind[M]) -> M:
        """The next message.

        Raises:
            RefusedError: it is none that is expected here.
            WebSocketDisconnect: the client has left.
        """
        received = await self._socket.receive()
        if received["type"] == "websocket.disconnect":
            raise WebSocketDisconnect
        return read_message(kind, received.get("text") or "")
