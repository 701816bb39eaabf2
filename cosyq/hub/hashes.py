"""How the Hub names contents: a large file by its sha256, any other as git does."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cosyq.hub.client import client, token

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def hashes(repo: str, commit: str, names: Iterable[str], *, remedy: str) -> dict[str, str]:
    """What the Hub says that files of a commit hash to, without those that it has not.

    The cache keeps each content under that hash: the Hub is asked only where a file is not there.

    Raises:
        NetworkError: it cannot be reached, or refuses.
    """
    from huggingface_hub import try_to_load_from_cache

    found = {}
    with client(f"{repo}@{commit}", remedy):
        for name in names:
            path = try_to_load_from_cache(repo, name, revision=commit)
            if not isinstance(path, str) or not _HASH.fullmatch(Path(path).resolve().name):
                return _listed(repo, commit)
            found[name] = Path(path).resolve().name
    return found


def _listed(repo: str, commit: str) -> dict[str, str]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    tree = HfApi(token=token() or False).list_repo_tree(repo, recursive=True, revision=commit)
    return {entry.path: listed_hash(entry) for entry in tree if isinstance(entry, RepoFile)}


def listed_hash(entry: Any) -> str:
    """The hash in an entry of a repository's listing."""
    return str(entry.lfs.sha256 if entry.lfs else entry.blob_id)


def content_hash(content: Path | bytes, like: str) -> str:
    """The content's hash of the kind that `like` is: sha256, or git's of a file."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size

    def git() -> Any:
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)

    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        return hashlib.file_digest(file, git if len(like) == 40 else hashlib.sha256).hexdigest()
