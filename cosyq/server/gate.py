"""What every request passes first: an id, a key, a limit on its body; and the line that is logged of it."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from cosyq.server.failures import INVALID, Failure, failure_of
from cosyq.server.logs import event
from cosyq.server.service import Service
from cosyq.server.speaker import BusyError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

ANSWERS = {"http": "http.response", "websocket": "websocket.http.response"}  # how a refusal is sent
FIELDS = "cosyq.fields"  # in the scope: what an endpoint wants to have logged
SPEECH = ("/v1/audio/speech",)
VOICES = "/v1/audio/voices"
LISTS = ("/v1/models", "/v1/audio/models", VOICES)
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class BrokenStreamError(Exception):
    """A response cannot be finished. Left open, it ends in a closed connection, which no client takes for an end."""


class Gate:
    """ASGI middleware."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]], service: Service):
        self._app, self._service = app, service
        self._keys = [_digest(key.encode()) for key in service.settings.keys]
        self._busy: Counter[bytes] = Counter()  # requests for speech that are being answered, by the key's digest

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        fields: dict[str, Any] = {}
        scope[FIELDS] = fields
        started, status, answer = time.monotonic(), 0, ANSWERS[scope["type"]]

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] in (f"{answer}.start", "websocket.accept"):
                status = message.get("status", 101)
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        path = route_of(scope)
        counted = path.startswith("/v1/")
        self._service.responses += counted
        speaks = path in SPEECH
        key = _digest(_given(headers)) if speaks else b""
        try:
            if (failure := self._refuse(scope, headers) or self._one_too_many(key)) is not None:
                await send_failure(failure, sending, answer)
                return
            self._busy[key] += speaks
            try:
                await self._app(scope, self._limited(path, receive), sending)
            finally:
                self._busy[key] -= speaks
                self._busy += Counter()  # without those at nothing
        except BrokenStreamError:
            fields["broken"] = True
        finally:
            self._service.responses -= counted
            if counted:
                seconds = round(time.monotonic() - started, 4)
                about = {
                    "method": scope.get("method", "WEBSOCKET"),
                    "path": path,
                    "status": status,
                    "seconds": seconds,
                }
                event("request", request_id=request_id, **about, **fields)

    def _refuse(self, scope: Message, headers: dict[bytes, str]) -> Failure | None:
        path, method = route_of(scope), scope.get("method", "WEBSOCKET")
        listed = self._service.settings.public_lists and method == "GET" and path in LISTS
        if path.startswith("/v1/") and not listed and not self._knows(headers):
            message = "the API key is missing or wrong: send `Authorization: Bearer KEY`"
            headers_back = {"www-authenticate": "Bearer"}
            return Failure(401, message, "authentication_error", None, "invalid_api_key", headers_back)
        origin, host = headers.get(b"origin", ""), headers.get(b"host", "")
        if method not in ("GET", "HEAD") and origin and origin.rpartition("://")[2] != host:
            # A form of a page from elsewhere, in the browser of someone who reaches this server.
            return Failure(403, "requests of other sites' pages are not answered", INVALID, None, "foreign_origin")
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._most(path):
            return self._too_large(path)
        return None

    def _one_too_many(self, key: bytes) -> Failure | None:
        """Whether whoever has this key has as many requests on the way as is allowed."""
        most = self._service.settings.key_concurrency
        if not self._keys or most is None or self._busy[key] < most:
            return None
        return failure_of(BusyError(f"{most} requests with this key are being answered", retry_after=1.0))

    def _knows(self, headers: dict[bytes, str]) -> bool:
        """Every key is compared, each in constant time."""
        if not self._keys:
            return True
        given = _digest(_given(headers))
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return any(matches)

    def _limited(self, path: str, receive: Receive) -> Receive:
        """A body without a length is counted as it comes."""
        total = 0

        async def receiving() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self._most(path):
                raise HTTPException(413, self._too_large(path).message)
            return message

        return receiving

    def _most(self, path: str) -> int:
        """Bytes of a body."""
        settings = self._service.settings
        return settings.max_body + (settings.max_sample if path == VOICES else 0)

    def _too_large(self, path: str) -> Failure:
        message = f"the body is larger than {self._most(path)} bytes"
        return Failure(413, message, INVALID, None, "body_too_large")


def route_of(scope: Message) -> str:
    """The path that the application routes by: without what it is mounted at, which a proxy may leave in."""
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    return path[len(root) :] if path.startswith(root + "/") else path


async def send_failure(failure: Failure, send: Send, answer: str) -> None:
    body = failure.body()
    about = {"content-type": "application/json", "content-length": str(len(body)), **failure.headers}
    headers = [(name.encode(), value.encode()) for name, value in about.items()]
    await send({"type": f"{answer}.start", "status": failure.status, "headers": headers})
    await send({"type": f"{answer}.body", "body": body})


def _given(headers: dict[bytes, str]) -> bytes:
    """The key that a request brings, or nothing."""
    scheme, _, key = headers.get(b"authorization", "").partition(" ")
    return key.strip().encode("latin-1", "replace") if scheme.lower() == "bearer" else b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
