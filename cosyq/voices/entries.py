"""The voices that a recipe names: fetched, hashed and heard before a weight is read, enrolled when the model is known.

A file is read both times, so that no recording is kept while gigabytes are fetched.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cosyq.audio.recording import Recording, read_recording
from cosyq.errors import ArtifactError, CosyqError, RecipeError, UsageError
from cosyq.hub.web import fetch_file
from cosyq.model.config import FlowConfig
from cosyq.recipe import Recipe, Source, VoiceEntry, bundled_checkpoint
from cosyq.voices.enrol import Encoders, check_take, enrol
from cosyq.voices.voice import Voice, load_voice

REMOTE_REMEDY = "name a local copy with --set voices.N.audio=FILE, or build without voices: --set voices=[]"


def pin(recipe: Recipe) -> Recipe:
    """The recipe with the sha256 of every voice's file, each of which is there and, where it is a recording, will do.

    Raises:
        RecipeError: a recording is missing, not the pinned one, unusable, or not of its transcript.
        ArtifactError: a ready voice is missing.
        NetworkError: a remote recording cannot be had.
    """
    pinned = [entry.model_copy(update={"sha256": _read(entry, recipe.source).sha256}) for entry in recipe.voices]
    return recipe.model_copy(update={"voices": pinned})


def make(recipe: Recipe, encoders_folder: Path | None, config: FlowConfig) -> list[tuple[str, Voice]]:
    """The voices of a pinned recipe by name; with recordings among them, the encoders' folder is needed.

    Raises:
        ArtifactError: a ready voice is damaged, or was made for another model.
        CheckpointError: the encoders are not usable.
        RecipeError: a file is no longer the pinned one.
    """
    encoders = Encoders(encoders_folder) if encoders_folder is not None else None
    voices = []
    for entry in recipe.voices:
        file = _read(entry, recipe.source)
        if encoders is not None and file.recording is not None:
            voice = enrol(entry.name, file.recording, entry.transcript or "", encoders, config)
        else:
            voice = load_voice(file.path, config)
        voices.append((entry.name, voice))
    return voices


@dataclass(frozen=True)
class _File:
    path: Path
    sha256: str
    recording: Recording | None  # of a ready voice, none


def _read(entry: VoiceEntry, source: Source) -> _File:
    origin = entry.audio or entry.file or ""
    if entry.bundled is not None:
        assert source.bundled is not None
        origin = str(bundled_checkpoint(source.bundled) / "voices" / f"{entry.bundled}.safetensors")
    try:
        path = fetch_file(origin, entry.sha256 or "") if entry.remote else Path(origin)
        recording = None
        if entry.audio is not None:
            recording = read_recording(path)
            check_take(entry.name, recording, entry.transcript or "")
        elif not path.is_file():
            raise ArtifactError("no such voice file")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if entry.sha256 not in (None, found):
            raise RecipeError(f"sha256 is {found}, the recipe pins {entry.sha256}")
        return _File(path, found, recording)
    except CosyqError as error:
        kind = RecipeError if isinstance(error, UsageError) else type(error)
        remedy = error.remedy or (REMOTE_REMEDY if entry.remote else None)
        raise kind(error.what, where=f"voice {entry.name}, {origin}", remedy=remedy) from None
    except OSError as error:
        raise RecipeError(f"cannot be read ({error.strerror})", where=f"voice {entry.name}, {origin}") from None
