"""cosyq serve: speech over HTTP."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosyq.cli.console import (
    DEFAULT_FOLDER,
    ArtifactOption,
    DtypeName,
    EngineName,
    choose_artifact,
    made_artifacts,
    note,
)
from cosyq.errors import ArtifactError, CosyqError, UsageError
from cosyq.server import ENCODING, REMEDY, missing, require_packages

if TYPE_CHECKING:
    from collections.abc import Callable

    from cosyq.artifact.reader import Artifact
    from cosyq.server.speaker import Speaker

ELSEWHERE = ("COSYQ_ARTIFACT", "COSYQ_DEBUG")  # variables that are read without an option of ours
LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(
    context: typer.Context,
    artifact: ArtifactOption = None,
    host: Annotated[str, typer.Option(envvar="COSYQ_HOST", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="COSYQ_PORT", min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="COSYQ_API_KEY", help="Whoever has it may speak; give it again for more keys."),
    ] = None,
    public_lists: Annotated[
        bool, typer.Option(envvar="COSYQ_PUBLIC_LISTS", help="List models and voices without a key.")
    ] = True,
    max_characters: Annotated[int, typer.Option(envvar="COSYQ_MAX_CHARACTERS", min=1, help="Of an input.")] = 4096,
    max_concurrency: Annotated[
        int | None,
        typer.Option(envvar="COSYQ_MAX_CONCURRENCY", min=1, max=256, help="Requests spoken at once; else by memory."),
    ] = None,
    key_concurrency: Annotated[
        int | None, typer.Option(envvar="COSYQ_KEY_CONCURRENCY", min=1, help="Requests at once of one API key.")
    ] = None,
    idle_unload: Annotated[
        float | None,
        typer.Option(envvar="COSYQ_IDLE_UNLOAD", min=1, help="Let go of the model after so many seconds unused."),
    ] = None,
    queue: Annotated[int, typer.Option(envvar="COSYQ_QUEUE", min=1, help="Requests that may wait.")] = 32,
    wait: Annotated[float, typer.Option(envvar="COSYQ_WAIT", min=0.1, help="Seconds that one waits.")] = 20.0,
    deadline: Annotated[float, typer.Option(envvar="COSYQ_DEADLINE", min=1, help="Seconds for a request.")] = 300.0,
    drain: Annotated[float, typer.Option(envvar="COSYQ_DRAIN", min=0, help="Seconds to finish after SIGTERM.")] = 30.0,
    source: Annotated[
        str | None,
        typer.Option(envvar="COSYQ_SOURCE", help="The encoders' DIR or REPO@REV, to add voices over HTTP."),
    ] = None,
    engine: Annotated[EngineName, typer.Option(envvar="COSYQ_ENGINE", help="What multiplies.")] = "auto",
    device: Annotated[str, typer.Option(envvar="COSYQ_DEVICE", help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[DtypeName, typer.Option(envvar="COSYQ_DTYPE", help="Of matrix products.")] = "auto",
) -> None:
    """Serve speech over HTTP as OpenAI's clients ask for it. Every option is also a variable, COSYQ_PORT and so on."""
    for name in unknown_variables(os.environ, context):
        note(f"warning: {name} means nothing here")
    if host not in LOCAL and not api_key:
        note(f"warning: whoever reaches {host}:{port} can speak without a key; set COSYQ_API_KEY")
    require_packages()
    if gone := missing(ENCODING):
        note(f"warning: there is no format but wav and pcm without {', '.join(gone)}; {REMEDY}")

    from cosyq.server import logs
    from cosyq.server.run import listen, serve
    from cosyq.server.settings import Settings

    folder = _folder(artifact)
    settings = Settings(
        keys=tuple(api_key or ()),
        public_lists=public_lists,
        max_characters=max_characters,
        longest_queue=queue,
        key_concurrency=key_concurrency,
        wait_seconds=wait,
        deadline_seconds=deadline,
        drain_seconds=drain,
    )
    listening = listen(host, port)
    logs.to_stderr()
    address, number = listening.getsockname()[:2]
    logs.event("listening", host=address, port=number, artifact=str(folder), keys=len(settings.keys))
    place = {"engine": engine, "device": device, "dtype": dtype}
    counts: dict[str, Any] = {"rows": max_concurrency, "longest_queue": queue, "idle": idle_unload}

    def loader(on_fatal: Callable[[CosyqError], None]) -> Speaker:
        """What brings torch, and may fetch encoders: probes are answered meanwhile."""
        from cosyq.cli.starting import starting

        with starting(folder, device, dtype, engine):
            from cosyq.artifact.reader import open_artifact
            from cosyq.server.batch import load_speaker

            opened = open_artifact(folder)
            return load_speaker(opened, place, on_fatal=on_fatal, encoders=_encoders(opened, source), **counts)

    if serve(settings, listening, loader):
        # Python, as it ends, would end that thread in the midst of torch's or the driver's code, which aborts.
        sys.stderr.flush()
        os._exit(0)


def unknown_variables(environment: Iterable[str], context: typer.Context) -> list[str]:
    """COSYQ_ variables that are nothing to this command, as a mistyped one would be."""
    known = {str(p.envvar) for p in context.command.params if getattr(p, "envvar", None)} | set(ELSEWHERE)
    return sorted(name for name in environment if name.startswith("COSYQ_") and name not in known)


def _encoders(opened: Artifact, source: str | None) -> Path | None:
    """Their folder, fetched if need be; None where none was asked for. The small model's come along."""
    if source is None and opened.manifest.bundled is None:
        return None
    from cosyq.cli.voice import encoders_folder
    from cosyq.voices.enrol import encoder_files

    folder = encoders_folder(opened, source)
    encoder_files(folder)
    return folder


def _folder(given: str | None) -> Path:
    """The artifact to serve; where none is named, QUANTIZATION_ENABLED and QUANTIZATION_BITS choose among them."""
    from cosyq.server.settings import quantization

    try:
        formats = quantization(dict(os.environ))
    except ValueError as error:
        remedy = "QUANTIZATION_ENABLED is true or false, QUANTIZATION_BITS 8 or 4"
        raise UsageError("not understood", where=str(error), remedy=remedy) from None
    if formats is None or given is not None or os.environ.get("COSYQ_ARTIFACT"):
        return choose_artifact(given)
    found = [folder for folder in made_artifacts() if _weights(folder) in formats]
    if not found:
        wanted = " or ".join(sorted(formats))
        raise ArtifactError(
            f"no artifact with {wanted} there", where=DEFAULT_FOLDER, remedy="`cosyq quantize` makes one"
        )
    note(f"using {found[-1]}")
    return found[-1]


def _weights(folder: Path) -> str:
    """How the language model's weights are stored; nothing where that cannot be read."""
    from cosyq.artifact.reader import read_manifest

    try:
        return str(read_manifest(folder).recipe["stages"]["llm"]["weights"])
    except ArtifactError:
        return ""
