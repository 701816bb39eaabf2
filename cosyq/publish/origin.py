"""An artifact's files against the hashes that the Hub has of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosyq.artifact.manifest import FILE_NAME
from cosyq.artifact.reader import MAX_MANIFEST, read_manifest
from cosyq.errors import ArtifactError
from cosyq.hub.client import AGAIN
from cosyq.hub.hashes import content_hash, hashes
from cosyq.hub.snapshot import find
from cosyq.publish.card import CARD_FILE
from cosyq.publish.reference import SCHEME, parse
from cosyq.publish.reports import REPORT_FILES


@dataclass(frozen=True)
class Origin:
    """The commit that an artifact's files are of, and how many they are."""

    reference: str
    files: int


def verify_origin(folder: Path, reference: str) -> Origin:
    """Compare every file of an artifact, manifest, card and reports among them, with what the Hub says they hash to.

    What is in the cache of the Hub's client is compared without asking.

    Raises:
        UsageError: it is no reference.
        NetworkError: the Hub cannot be reached, or refuses.
        ArtifactError: a file is another, or is not there.
    """
    repo, revision = parse(reference)
    commit = find(repo, revision, FILE_NAME, limit=MAX_MANIFEST, remedy=AGAIN).parent.name
    pinned = f"{SCHEME}{repo}@{commit}"
    beside = [name for name in (CARD_FILE, *REPORT_FILES) if (folder / name).is_file()]
    names = [FILE_NAME, *read_manifest(folder).files, *beside]
    known = hashes(repo, commit, names, remedy=AGAIN)
    if missing := [name for name in names if name not in known]:
        raise ArtifactError(f"{pinned} has no {', '.join(missing)}", where=folder)
    if other := [name for name in names if content_hash(folder / name, known[name]) != known[name]]:
        raise ArtifactError(f"differs from {pinned} in {', '.join(other)}", where=folder)
    return Origin(pinned, len(names))
