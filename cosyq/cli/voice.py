"""cosyq voice: the voices of an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosyq.cli.console import ArtifactOption, Json, choose_artifact, emit, note, print_table
from cosyq.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from cosyq.artifact.reader import Artifact
    from cosyq.voices.voice import Voice

app = typer.Typer(help="The voices of an artifact.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="A voice's name.")]
Source = Annotated[str | None, typer.Option(help="Where the encoders are: the checkpoint's folder, or REPO@REVISION.")]


@app.command("add")
def add(
    name: Name,
    audio: Annotated[Path, typer.Option(help="1 to 30 seconds of speech: wav, flac, mp3 or ogg.")],
    transcript: Annotated[str, typer.Option(help="What is said in it; without it only the timbre is taken.")] = "",
    artifact: ArtifactOption = None,
    source: Source = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a voice of that name.")] = False,
    as_json: Json = False,
) -> None:
    """Make a voice from a recording and keep it in the artifact."""
    from cosyq.artifact.edit import put_voice
    from cosyq.artifact.reader import open_artifact

    opened = open_artifact(choose_artifact(artifact, to_change=True))
    if name in opened.voice_files() and not force:
        raise UsageError("there is such a voice already", where=name, remedy="use another name, or --force")
    voice = make_voice(opened, name, audio, transcript, source)
    put_voice(opened, name, voice.to_bytes())
    _report(voice, as_json)


@app.command("list")
def list_voices(artifact: ArtifactOption = None, as_json: Json = False) -> None:
    """Name the voices of an artifact."""
    from cosyq.artifact.reader import open_artifact
    from cosyq.voices.voice import load_voice

    opened = open_artifact(choose_artifact(artifact))
    voices = [load_voice(path, opened.manifest.model.flow) for path in opened.voice_files().values()]
    names = list(opened.voice_files())
    if as_json:
        emit({"voices": [_about(voice) | {"name": name} for name, voice in zip(names, voices, strict=True)]})
        return
    rows = [[name, f"{_seconds(voice):.1f} s", voice.transcript] for name, voice in zip(names, voices, strict=True)]
    print_table("voices", ["name", "prompt", "transcript"], rows)


@app.command("show")
def show(name: Name, artifact: ArtifactOption = None, as_json: Json = False) -> None:
    """Describe a voice: an artifact's, or a voice file."""
    from cosyq.artifact.reader import open_artifact
    from cosyq.runtime.synthesizer import find_voice

    _report(find_voice(open_artifact(choose_artifact(artifact)), name), as_json)


@app.command("remove")
def remove(name: Name, artifact: ArtifactOption = None, as_json: Json = False) -> None:
    """Take a voice out of an artifact."""
    from cosyq.artifact.edit import remove_voice
    from cosyq.artifact.reader import open_artifact

    opened = open_artifact(choose_artifact(artifact, to_change=True))
    _require(opened, name)
    remove_voice(opened, name)
    if as_json:
        emit({"removed": name})


@app.command("export")
def export(
    name: Name,
    output: Annotated[Path, typer.Option("-o", "--output", help="The voice file to write.")],
    artifact: ArtifactOption = None,
    as_json: Json = False,
) -> None:
    """Copy a voice of an artifact to a file, for another artifact of the same model."""
    import shutil

    from cosyq.artifact.reader import open_artifact
    from cosyq.files import whole_file

    opened = open_artifact(choose_artifact(artifact))
    _require(opened, name)
    if output.exists():
        raise UsageError("exists already", where=output)
    with whole_file(output) as partial:
        shutil.copyfile(opened.voice_files()[name], partial)
    if as_json:
        emit({"voice": name, "output": str(output)})
    else:
        print(output)


def make_voice(opened: Artifact, name: str, audio: Path, transcript: str, source: str | None) -> Voice:
    """Enrol a recording with the encoders of the checkpoint that the artifact was made from, or of `source`."""
    from cosyq.audio.recording import read_recording
    from cosyq.voices.enrol import Encoders, check_take, enrol

    recording = read_recording(audio)
    check_take(name, recording, transcript)  # before a gigabyte is fetched or read
    return enrol(name, recording, transcript, Encoders(encoders_folder(opened, source)), opened.manifest.model.flow)


def encoders_folder(opened: Artifact, source: str | None, names: Sequence[str] | None = None) -> Path:
    """Where the checkpoint's encoders are; of the Hub, the ones of these names are fetched, or all.

    Raises:
        CheckpointError: the artifact does not say where.
        NetworkError: they cannot be fetched.
    """
    from cosyq.hub.snapshot import fetch
    from cosyq.recipe import bundled_checkpoint
    from cosyq.voices.enrol import ENCODER_FILES

    if source is not None and Path(source).is_dir():
        return Path(source)
    if source is None and opened.manifest.bundled is not None:
        return bundled_checkpoint(opened.manifest.bundled)
    repo, _, revision = source.partition("@") if source else (opened.manifest.source.repo, "", None)
    revision = revision or opened.manifest.source.revision
    if not repo or not revision:
        raise CheckpointError(
            "the artifact does not say where its encoders are", where=opened.folder, remedy="give --source DIR"
        )
    note(f"encoders: {repo}@{revision}")
    return fetch(repo, revision, [(name,) for name in names or ENCODER_FILES])


def _require(opened: Artifact, name: str) -> None:
    if name not in opened.voice_files():
        have = ", ".join(opened.voice_files()) or "none"
        raise UsageError("unknown voice", where=name, remedy=f"the artifact has: {have}")


def _seconds(voice: Voice) -> float:
    return voice.prompt_tokens.numel() / 25


def _about(voice: Voice) -> dict[str, Any]:
    return {
        "name": voice.name,
        "prompt_seconds": _seconds(voice),
        "prompt_tokens": voice.prompt_tokens.numel(),
        "transcript": voice.transcript,
    }


def _report(voice: Voice, as_json: bool) -> None:
    if as_json:
        emit(_about(voice))
        return
    what = f"{_seconds(voice):.1f} s of prompt" if voice.prompt_tokens.numel() else "a speaker vector, no prompt"
    note(f"{voice.name}: {what}; transcript: {voice.transcript or 'none'}")
