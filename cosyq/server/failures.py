"""Every failure as OpenAI's clients know them: a status, and {"error": {message, type, param, code}}."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

from cosyq.errors import CosyqError, UsageError
from cosyq.server.speaker import BusyError, DeadlineError, UnavailableError

INVALID, SERVER, RATE_LIMIT = "invalid_request_error", "server_error", "rate_limit_error"


@dataclass(frozen=True)
class Failure:
    """An answer that is no success."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def error(self) -> dict[str, str | None]:
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}

    def body(self) -> bytes:
        """ASCII: what a client sent may hold half a surrogate, which UTF-8 cannot."""
        return json.dumps({"error": self.error()}).encode("ascii")


class RefusedError(Exception):
    """The request is not answered with a success; `failure` says how."""

    def __init__(self, failure: Failure):
        super().__init__(failure.message)
        self.failure = failure


def refused(status: int, message: str, *, param: str | None = None, code: str | None = None) -> RefusedError:
    return RefusedError(Failure(status, message, INVALID, param, code))


def failure_of(error: CosyqError, *, param: str | None = None) -> Failure:
    """What to answer when `error` was met before the first audio. `param` is the field that a usage error is of."""
    if isinstance(error, BusyError):
        milliseconds = math.ceil(1000 * error.retry_after)
        headers = {"retry-after": str(math.ceil(error.retry_after)), "retry-after-ms": str(milliseconds)}
        return Failure(429, str(error), RATE_LIMIT, None, "rate_limit_exceeded", headers)
    if isinstance(error, UnavailableError):
        return Failure(503, str(error), SERVER, None, "unavailable", {"retry-after": "5"})
    if isinstance(error, DeadlineError):
        return Failure(504, str(error), SERVER, None, "deadline_exceeded")
    if isinstance(error, UsageError):
        return Failure(400, str(error), INVALID, param, "invalid_value")
    return Failure(500, str(error), SERVER, None, "internal_error")
