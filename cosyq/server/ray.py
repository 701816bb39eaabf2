"""The same server on Ray Serve: as many replicas as there is work for, each on a GPU of its own, on several machines.

    serve run cosyq.server.ray:app artifact=/shared/fun-cosyvoice3-0.5b-int8 max_replicas=4

Ray's proxies take the requests, choose a replica for each, pass on what it sends as it comes, and cancel what nobody
waits for any more. A replica is what `cosyq serve` runs, without the socket: its queue, its limits, /health and
/metrics are its own. Voices are fixed: replicas that write one manifest would write over each other's.
"""

# Annotations are evaluated here: Ray makes the builder's argument by the one that it finds.

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve

from cosyq.errors import CosyqError
from cosyq.server import logs
from cosyq.server.app import make_app
from cosyq.server.gate import Message, Receive, Send
from cosyq.server.service import Service
from cosyq.server.settings import PREFIX, Settings
from cosyq.server.speaker import Speaker

ROWS_OF_A_CPU, ROWS_OF_A_GPU = 4, 16  # spoken at once by a replica; known before it has a device to measure


class Options(BaseModel):
    """What the application is told: as `cosyq serve`, and by the same variables, COSYQ_QUEUE and so on, where it runs
    as a command. Counts and limits are each replica's.

    artifact: a folder, at the same path on every machine.
    api_key: one or more, separated by spaces.
    device: cpu takes none of Ray's GPUs, anything else one a replica.
    min_replicas, max_replicas: there are more while more than `max_concurrency` requests are with one.
    """

    model_config = ConfigDict(extra="forbid")

    artifact: Path
    api_key: str = ""
    public_lists: bool = True
    max_characters: Annotated[int, Field(ge=1)] = 4096
    max_concurrency: Annotated[int, Field(ge=1, le=256)] | None = None
    key_concurrency: Annotated[int, Field(ge=1)] | None = None
    idle_unload: Annotated[float, Field(ge=1)] | None = None
    queue: Annotated[int, Field(ge=1)] = 32
    wait: Annotated[float, Field(ge=0.1)] = 20.0
    deadline: Annotated[float, Field(ge=1)] = 300.0
    drain: Annotated[float, Field(ge=0)] = 30.0
    engine: Literal["auto", "fused", "fused8", "cpu", "reference", "unpacked", "bnb"] = "auto"
    device: str = "auto"
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="before")
    @classmethod
    def _with_variables(cls, given: dict[str, Any]) -> dict[str, Any]:
        told = {name: value for name in cls.model_fields if (value := os.environ.get(PREFIX + name.upper()))}
        return told | given

    @property
    def rows(self) -> int:
        return self.max_concurrency or (ROWS_OF_A_CPU if self.device == "cpu" else ROWS_OF_A_GPU)

    def settings(self) -> Settings:
        return Settings(
            keys=tuple(self.api_key.split()),
            public_lists=self.public_lists,
            max_characters=self.max_characters,
            fixed_voices=True,
            longest_queue=self.queue,
            key_concurrency=self.key_concurrency,
            wait_seconds=self.wait,
            deadline_seconds=self.deadline,
            drain_seconds=self.drain,
        )


@serve.ingress()
class Replica:
    """A server without its socket. Ray sends it requests once its first check has passed, when its model is there."""

    def __init__(self, options: Options):
        logs.to_stderr()
        self._options, self._service = options, Service(options.settings())

    def __serve_build_asgi_app__(self) -> Any:
        app = make_app(self._service, self._load)
        app.add_middleware(OneRequestId)
        return app

    def _load(self, on_fatal: Callable[[CosyqError], None]) -> Speaker:
        from cosyq.artifact.reader import open_artifact
        from cosyq.server.batch import load_speaker

        told = self._options
        place = {"engine": told.engine, "device": told.device, "dtype": told.dtype}
        opened, idle = open_artifact(told.artifact), told.idle_unload
        return load_speaker(opened, place, on_fatal=on_fatal, rows=told.rows, longest_queue=told.queue, idle=idle)

    async def check_health(self) -> None:
        """Raises what the model could not be loaded for, or its device failed with: Ray then makes another replica."""
        await self._service.loaded()


class OneRequestId:
    """ASGI middleware: leaves x-request-id to Ray, which adds to each answer what it has told us with the request."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]):
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if "headers" in message:
                message["headers"] = [(name, value) for name, value in message["headers"] if name != b"x-request-id"]
            await send(message)

        await self._app(scope, receive, sending)


def app(options: Options) -> serve.Application:
    """The application, as `serve run` and Ray's configuration files ask for it: with their arguments."""
    held = options.rows + options.queue
    deployment = serve.deployment(
        name="cosyq",
        ray_actor_options={"num_gpus": 0 if options.device == "cpu" else 1},
        # A replica refuses what it cannot hold, in OpenAI's words. Ray's own refusal, a line of text, is left for when
        # there is no replica, and for floods: what it counts as queued is also what it is just passing on.
        max_ongoing_requests=2 * held,
        max_queued_requests=10 * held,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.rows,
        },
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=options.drain,
    )
    return deployment(Replica).bind(options.model_copy(update={"artifact": options.artifact.absolute()}))
