"""Changing an artifact in place: its voices, and the manifest that lists them."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from cosyq.artifact.manifest import FILE_NAME, VOICE_FOLDER, FileRecord, Manifest
from cosyq.artifact.reader import Artifact
from cosyq.errors import ArtifactError
from cosyq.files import whole_file


def put_voice(artifact: Artifact, name: str, data: bytes) -> Artifact:
    """Write a voice's file and list it. An existing voice of that name is replaced.

    Raises:
        ArtifactError: the artifact cannot be written.
    """
    record = FileRecord(len(data), hashlib.sha256(data).hexdigest())
    target = artifact.folder / VOICE_FOLDER / f"{name}.safetensors"
    try:
        target.parent.mkdir(exist_ok=True)
        # Unlisted first: whatever is interrupted, every file the manifest lists is as it says.
        artifact = _unlist(artifact, name)
        with whole_file(target) as partial:
            partial.write_bytes(data)
        return _write_manifest(artifact, {**artifact.manifest.files, _key(name): record})
    except OSError as error:
        raise ArtifactError(f"cannot be written ({error.strerror or error})", where=target) from None


def remove_voice(artifact: Artifact, name: str) -> Artifact:
    """Take a voice out.

    Raises:
        ArtifactError: the artifact cannot be written.
    """
    target = artifact.folder / VOICE_FOLDER / f"{name}.safetensors"
    try:
        artifact = _unlist(artifact, name)
        target.unlink(missing_ok=True)
        return artifact
    except OSError as error:
        raise ArtifactError(f"cannot be written ({error.strerror or error})", where=target) from None


def _key(name: str) -> str:
    return f"{VOICE_FOLDER}/{name}.safetensors"


def _unlist(artifact: Artifact, name: str) -> Artifact:
    files = {key: record for key, record in artifact.manifest.files.items() if key != _key(name)}
    return artifact if len(files) == len(artifact.manifest.files) else _write_manifest(artifact, files)


def _write_manifest(artifact: Artifact, files: dict[str, FileRecord]) -> Artifact:
    manifest: Manifest = replace(artifact.manifest, files=files)
    with whole_file(artifact.folder / FILE_NAME) as partial:
        partial.write_bytes(manifest.to_json().encode())
    return Artifact(artifact.folder, manifest)
