"""hf://REPO@REV -> a folder: pinned to a commit, fetched once, checked as any artifact is."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from cosyq.artifact.manifest import FILE_NAME
from cosyq.artifact.reader import MAX_MANIFEST, open_artifact, read_manifest
from cosyq.artifact.writer import check_output, check_room, new_folder
from cosyq.audit import verify_artifact
from cosyq.hub.client import AGAIN
from cosyq.hub.snapshot import fetch, find
from cosyq.publish.card import CARD_FILE
from cosyq.publish.reference import SCHEME, parse
from cosyq.publish.reports import REPORT_FILES

_BESIDE = (CARD_FILE, *REPORT_FILES)
_REMEDY = f"{AGAIN}; or name a local folder"


@dataclass(frozen=True)
class Snapshot:
    """An artifact of the Hub, in the local cache: not to be changed."""

    folder: Path
    repo: str
    commit: str

    @property
    def reference(self) -> str:
        return f"{SCHEME}{self.repo}@{self.commit}"


def locate(reference: str) -> Snapshot:
    """The artifact of a reference, fetched where the cache lacks it. What the manifest does not list stays there.

    Raises:
        UsageError: it is no reference.
        NetworkError: the Hub cannot be reached, refuses, or lacks a file, and the cache has not all of it.
        ArtifactError: the repository's manifest is not usable.
    """
    repo, revision = parse(reference)
    folder = find(repo, revision, FILE_NAME, limit=MAX_MANIFEST, remedy=_REMEDY).parent
    commit = folder.name
    files = read_manifest(folder).files
    limit = sum(record.bytes for record in files.values()) + MAX_MANIFEST
    wanted = [(name,) for name in (FILE_NAME, *files)]
    return Snapshot(
        fetch(repo, commit, wanted, optional=_BESIDE, limit=limit, remedy=_REMEDY), repo=repo, commit=commit
    )


def pull(reference: str, output: Path, *, force: bool) -> Snapshot:
    """Copy an artifact of the Hub to a folder of its own, every hash checked before the folder appears.

    Raises:
        UsageError, NetworkError: as `locate`.
        ArtifactError: it is damaged, or cannot be written.
    """
    check_output(output, force=force)
    snapshot = locate(reference)
    files = read_manifest(snapshot.folder).files
    check_room(output, sum(record.bytes for record in files.values()))
    beside = [name for name in _BESIDE if (snapshot.folder / name).is_file()]
    with new_folder(output, force=force) as folder:
        for name in (FILE_NAME, *files, *beside):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(snapshot.folder / name, folder / name)
        verify_artifact(open_artifact(folder))
    return snapshot
