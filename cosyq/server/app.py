"""The HTTP interface: OpenAI's speech endpoint, what there is to choose from, and how the server is."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from fastapi import FastAPI, Form, Request, UploadFile, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from starlette.exceptions import HTTPException

from cosyq import __version__
from cosyq.errors import CosyqError, UsageError
from cosyq.server.asked import speech_request
from cosyq.server.conversation import Conversation
from cosyq.server.delivery import ClientGoneError, Delivery
from cosyq.server.encoders import WIRES, make_encoder, prepare
from cosyq.server.failures import INVALID, SERVER, Failure, RefusedError, failure_of, refused
from cosyq.server.gate import FIELDS, VOICES, Gate
from cosyq.server.logs import event, log
from cosyq.server.schemas import MODEL_ALIASES, VOICE_NAME, ErrorBody, SpeechBody
from cosyq.server.service import Loader, Service

CLIENT_GONE = 499  # nginx's; nobody sees it but the log
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 409, 413, 429, 500, 503, 504)
}
HERE = Path(__file__).parent


def make_app(service: Service, loader: Loader) -> FastAPI:
    """The application; it loads its speaker when it starts."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.load(loader)
        await asyncio.to_thread(prepare)
        yield
        service.close()

    app = FastAPI(
        title="cosyq", version=__version__, lifespan=life, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.add_middleware(Gate, service=service)
    _answer_failures(app)
    _speech(app, service)
    _lists(app, service)
    _voices(app, service)
    _health(app, service)
    _page(app)
    return app


def _speech(app: FastAPI, service: Service) -> None:
    audio = {wire.media_type: {"schema": {"type": "string", "format": "binary"}} for wire in WIRES.values()}
    content = {**audio, "text/event-stream": {}}
    success: dict[int | str, dict[str, Any]] = {200: {"description": "Audio as it is made.", "content": content}}

    @app.post("/v1/audio/speech", response_class=Response, responses={**ERRORS, **success})
    async def speak(body: SpeechBody, request: Request) -> Response:
        wanted, tempo = speech_request(body, body.input, service)
        fields = request.scope[FIELDS]
        fields |= {"voice": wanted.voice, "format": body.response_format, "characters": len(body.input)}
        encoder = make_encoder(body.response_format, service.speaker.sample_rate, tempo)
        delivery = Delivery(service, fields, service.submit(wanted), encoder, tempo)
        service.metrics.characters.inc(len(body.input))

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        try:
            await delivery.begin(gone())
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)
        events = body.stream_format == "sse"
        return delivery.response(
            WIRES[body.response_format].media_type, events=events, timestamps=body.timestamps and events
        )

    @app.websocket("/v1/audio/speech")
    async def converse(socket: WebSocket) -> None:
        await Conversation(service, socket).hold()


def _lists(app: FastAPI, service: Service) -> None:
    def names() -> tuple[str, ...]:
        return (service.speaker.about()["artifact"], *MODEL_ALIASES)

    def model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "cosyq"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model(name) for name in names()]}

    @app.get("/v1/models/{name}", responses=ERRORS)
    async def one_model(name: str) -> dict[str, Any]:
        if name not in names():
            raise refused(404, f"there is no model {name!r}", param="model", code="model_not_found")
        return model(name)

    @app.get("/v1/audio/models")
    async def audio_models() -> dict[str, Any]:
        return {"models": [{"id": name, "name": name} for name in names()]}

    @app.get(VOICES)
    async def voices() -> dict[str, Any]:
        found = [{"id": name, "name": name} for name in service.speaker.voices()]
        return {"voices": found, "aliases": service.voice_aliases()}


def _voices(app: FastAPI, service: Service) -> None:
    def require_changeable() -> None:
        if service.settings.fixed_voices:
            message = "the voices here are fixed: `cosyq voice` adds them to the artifact and removes them"
            raise refused(403, message, code="voices_fixed")
        service.require_ready()

    @app.post(VOICES, responses=ERRORS)
    async def add(
        name: Annotated[str, Form(max_length=100)],
        audio_sample: UploadFile,
        consent: Annotated[str, Form(max_length=200)],
        transcript: Annotated[str, Form(max_length=4096)] = "",
    ) -> dict[str, Any]:
        """Make a voice of a recording. `consent` says that who speaks in it agrees: true, or where that is written."""
        if consent.strip().lower() in ("", "false", "no", "0"):
            message = "clone only voices whose owners agree, and say so"
            raise refused(400, message, param="consent", code="consent_required")
        if not VOICE_NAME.fullmatch(name):
            message = "a voice's name is letters, digits, dots, dashes and underscores"
            raise refused(400, message, param="name", code="invalid_value")
        if name in service.speaker.voices():
            raise refused(409, f"there is a voice {name!r} already", param="name", code="voice_exists")
        if (audio_sample.size or 0) > service.settings.max_sample:
            message = f"the recording is larger than {service.settings.max_sample} bytes"
            raise refused(413, message, param="audio_sample", code="body_too_large")
        require_changeable()
        try:
            await asyncio.to_thread(_keep, service, name, audio_sample.file, transcript)
        except UsageError as error:
            failure = Failure(400, error.what, INVALID, "audio_sample", "invalid_value")  # `where` is a path of ours
            raise RefusedError(failure) from None
        event("voice added", name=name, consent=consent)
        return {"object": "audio.voice", "id": name, "name": name, "created_at": int(time.time())}

    @app.delete(VOICES + "/{name}", responses=ERRORS)
    async def remove(name: str) -> dict[str, Any]:
        require_changeable()
        if name not in service.speaker.voices():
            raise refused(404, f"there is no voice {name!r}", param="name", code="voice_not_found")
        await asyncio.to_thread(service.speaker.remove_voice, name)
        event("voice removed", name=name)
        return {"object": "audio.voice.deleted", "id": name, "deleted": True}


def _keep(service: Service, name: str, upload: BinaryIO, transcript: str) -> None:
    with tempfile.TemporaryDirectory(prefix="cosyq-") as folder:
        path = Path(folder) / "sample"
        with path.open("wb") as file:
            shutil.copyfileobj(upload, file)
        service.speaker.add_voice(name, path, transcript)


def _health(app: FastAPI, service: Service) -> None:
    def phase() -> Response:
        status = 200 if service.phase == "ready" else 503
        return Response(f'{{"status": "{service.phase}"}}', status, media_type="application/json")

    @app.get("/livez")
    async def livez() -> dict[str, str]:
        return {"status": "alive"}

    states: dict[int | str, dict[str, Any]] = {
        200: {"content": {"application/json": {}}},
        503: {"description": "Loading, draining or dead.", "content": {"application/json": {}}},
    }

    @app.get("/readyz", response_class=Response, responses=states)
    async def readyz() -> Response:
        return phase()

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Answers 200 in any phase: it describes; whether to send requests is /readyz's to say."""
        stats = service.stats()
        about = service.speaker.about() if stats else {}
        load = {"waiting": stats.waiting, "active": stats.active, "memory_bytes": stats.memory_bytes} if stats else {}
        return {"status": service.phase, "version": __version__, **about, **load}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=service.metrics.content_type)


def _page(app: FastAPI) -> None:
    """Two files that ask for nothing from elsewhere; the browser is told to hold them to it."""
    policy = "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
    headers = {
        "content-security-policy": policy + "; frame-ancestors 'none'; form-action 'none'; base-uri 'none'",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(HERE / "page.html", headers=headers)

    @app.get("/page.js", include_in_schema=False)
    async def script() -> Response:
        return FileResponse(HERE / "page.js", media_type="text/javascript", headers=headers)


def _answer_failures(app: FastAPI) -> None:
    def answer(failure: Failure) -> Response:
        return Response(failure.body(), failure.status, failure.headers, "application/json")

    @app.exception_handler(RefusedError)
    async def refused_one(_: Request, error: RefusedError) -> Response:
        return answer(error.failure)

    @app.exception_handler(CosyqError)
    async def ours(_: Request, error: CosyqError) -> Response:
        return answer(failure_of(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        param = place[0] if place and first["type"] != "json_invalid" else None
        message = f"{'.'.join(place)}: {first['msg']}" if param else f"the body is no JSON object: {first['msg']}"
        return answer(Failure(400, message, INVALID, param, first["type"]))

    @app.exception_handler(HTTPException)
    async def of_the_framework(_: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}.get(error.status_code)
        headers = dict(error.headers or {})
        return answer(Failure(error.status_code, str(error.detail), INVALID, None, code, headers))

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        log.error("internal error", extra={"fields": {"error": type(error).__name__}})
        return answer(Failure(500, "internal error", SERVER, None, "internal_error"))
