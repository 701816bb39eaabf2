"""Repositories of the Hub, read: only the files that are needed, and nothing twice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from cosyq.errors import NetworkError
from cosyq.hub.client import OutOfReachError, client, token

COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch(
    repo: str,
    revision: str,
    wanted: Sequence[tuple[str, ...]],
    *,
    optional: Sequence[str] = (),
    limit: int | None = None,
    remedy: str = "give a local checkpoint with --source DIR",
) -> Path:
    """The folder of a snapshot that holds, of each tuple of alternatives, the first that the repository has.

    A complete snapshot in the local cache is used without asking the Hub.

    Args:
        optional: files that come along if the repository has them.
        limit: the most bytes that all of it may have.
        remedy: what to do where the Hub is out of reach.

    Raises:
        NetworkError: the Hub cannot be reached, refuses, lacks a file, or has more than `limit`.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.hf_api import RepoFile

    cached = _cached(repo, revision, wanted)
    if cached:
        return cached
    where = f"{repo}@{revision}"
    known = token() or False
    with client(where, remedy):
        tree = HfApi(token=known).list_repo_tree(repo, recursive=True, revision=revision)
        sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
        chosen = [next((name for name in names if name in sizes), None) for names in wanted]
        lacking = [names[-1] for names, found in zip(wanted, chosen, strict=True) if found is None]
        if lacking:
            raise NetworkError(f"the repository lacks {', '.join(lacking)}", where=where)
        needed, extra = [name for name in chosen if name], [name for name in optional if name in sizes]
        total = sum(sizes[name] for name in (*needed, *extra))
        if limit is not None and total > limit:
            raise NetworkError(f"{total} bytes, where at most {limit} are expected", where=where)
        if extra:  # first, so that they are there whenever the snapshot counts as complete
            snapshot_download(repo, revision=revision, allow_patterns=extra, token=known)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=needed, token=known))


def find(repo: str, revision: str, name: str, *, limit: int, remedy: str) -> Path:
    """A file of at most `limit` bytes, at a branch, tag or commit: in the cache, in a folder named after the commit.

    A commit's is asked for once. Where the Hub is out of reach, a branch or tag is what it was when last asked for.

    Raises:
        NetworkError: the Hub cannot be reached and nothing is cached, or it refuses, or the file is too large.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    where = f"{repo}@{revision}"
    known = token() or False
    try:
        with client(where, remedy):
            cached = try_to_load_from_cache(repo, name, revision=revision)
            if COMMIT.fullmatch(revision) and isinstance(cached, str):
                return Path(cached)
            about = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision), token=known)
            if about.size is None or about.size > limit:
                raise NetworkError(f"{name} has {about.size} bytes, at most {limit} are expected", where=where)
            return Path(hf_hub_download(repo, name, revision=revision, token=known))
    except OutOfReachError:
        if isinstance(cached, str):
            return Path(cached)
        raise


def _cached(repo: str, revision: str, wanted: Sequence[tuple[str, ...]]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    folder = None
    for names in wanted:
        found = next(
            (path for name in names if isinstance(path := try_to_load_from_cache(repo, name, revision=revision), str)),
            None,
        )
        if found is None:
            return None
        depth = names[0].count("/") + 1
        folder = Path(found).parents[depth - 1]
    return folder
