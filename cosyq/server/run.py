"""The process: a socket, uvicorn, and a stop that lets what is spoken finish."""

from __future__ import annotations

import socket
import sys
import time
from types import FrameType

import uvicorn

from cosyq.errors import UsageError
from cosyq.server.app import make_app
from cosyq.server.logs import event
from cosyq.server.service import Loader, Service
from cosyq.server.settings import Settings

LAST_SECONDS = 1  # for responses that the hard deadline cut
BACKLOG = 2048
# Seconds for which a thread may keep Python's lock from another. The engine's launches kernels all the time; with
# Python's own 5 ms an answer waits for it several times over on its way out (docs/speed.md).
SWITCH = 0.0005


class Server(uvicorn.Server):
    """Keeps answering probes while it drains, and stops when the last response is out or the time is over."""

    def __init__(self, service: Service, loader: Loader):
        self.service = service
        self._stop_at: float | None = None
        config = uvicorn.Config(
            make_app(service, loader),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=LAST_SECONDS,
            ws="websockets-sansio",
            ws_max_size=service.settings.max_body,
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal drains, a second one stops at once. Neither is raised again: a drained stop is a success."""
        self.stop(0.0 if self._stop_at is not None else self.service.settings.drain_seconds)

    def stop(self, seconds: float) -> None:
        """Take nothing more, and be gone after `seconds` at the latest."""
        self._stop_at = time.monotonic() + seconds
        self.service.drain()

    async def on_tick(self, counter: int) -> bool:
        if self.service.phase == "dead":
            return True
        if self._stop_at is not None:
            late = time.monotonic() >= self._stop_at
            if late and self.service.responses:
                event("cutting", responses=self.service.responses)
                self.service.cut("the server is stopping")
            if late or not self.service.responses:
                return True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        UsageError: the address cannot be had.
    """
    try:
        # The protocol by its number: asyncio switches Nagle's algorithm off for sockets that name TCP, and only for
        # those. With it every small answer waits 40 ms for an acknowledgement.
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(BACKLOG)
        except OSError:
            listening.close()
            raise
        return listening
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        where, remedy = f"{host}:{port}", "use another --host or --port"
        raise UsageError(f"cannot listen there ({reason})", where=where, remedy=remedy) from None


def serve(settings: Settings, listening: socket.socket, loader: Loader) -> bool:
    """Serve until a signal says stop; whether the speaker is being loaded still, by a thread that is not waited for.

    Raises:
        CosyqError: the speaker could not be loaded, or its device has failed.
    """
    service, before = Service(settings), sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        Server(service, loader).run(sockets=[listening])
    finally:
        sys.setswitchinterval(before)
    if service.error is not None:
        raise service.error
    return service.loads
