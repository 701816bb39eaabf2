"""Repositories of the Hub, written: one commit, of what differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosyq.errors import NetworkError
from cosyq.hub.client import AGAIN, client, token
from cosyq.hub.hashes import content_hash, listed_hash


@dataclass(frozen=True)
class Pushed:
    """What a push did, or would do. `commit` and `url` are None where there is no repository yet."""

    commit: str | None
    url: str | None
    sent: tuple[str, ...]
    removed: tuple[str, ...]


def push(
    repo: str,
    files: Mapping[str, Path | bytes],
    *,
    ours: Callable[[str], bool],
    message: str,
    private: bool,
    branch: str,
    dry_run: bool,
) -> Pushed:
    """Make a branch of a repository hold `files`, in one commit, or in none where it holds them already.

    Only what differs is sent, and large files that arrived before are not sent again, whether the push ended or not.
    Of the other files there, those with a name that is `ours` are removed, and the rest stays. Repository and branch
    are made where they are missing. If another commit comes in between, the Hub refuses.

    Raises:
        NetworkError: no HF_TOKEN, the Hub refuses or cannot be reached, or `private` is asked of a public repository.
        UsageError: no repository can have that name.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.hf_api import RepoFile

    where = f"{repo}@{branch}"
    known = token()
    if known is None:
        raise NetworkError(
            "HF_TOKEN is not set", where=where, remedy="https://huggingface.co/settings/tokens makes one that may write"
        )
    with client(where, AGAIN):
        api = HfApi(token=known)
        new_branch = False
        try:
            info = api.model_info(repo, revision=branch)
        except RevisionNotFoundError:
            info, new_branch = api.model_info(repo), True
        except RepositoryNotFoundError as error:
            if error.response.status_code != 404:
                raise
            if dry_run:
                return Pushed(None, None, tuple(files), ())
            api.create_repo(repo, private=private, exist_ok=True)
            info, new_branch = api.model_info(repo), branch != "main"
        if private and not info.private:
            raise NetworkError("is public", where=repo, remedy="make it private in its settings, or push elsewhere")
        tree = api.list_repo_tree(repo, recursive=True, revision=info.sha)
        there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        sent = tuple(name for name, content in files.items() if name not in there or not _same(content, there[name]))
        removed = tuple(name for name in there if name not in files and ours(name))
        if new_branch and not dry_run:
            api.create_branch(repo, branch=branch, revision=info.sha, exist_ok=True)
        if dry_run or not (sent or removed):
            return Pushed(info.sha, f"{api.endpoint}/{repo}/commit/{info.sha}", sent, removed)
        done = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(name, files[name]) for name in sent),
                *(CommitOperationDelete(name, is_folder=False) for name in removed),
            ],
            commit_message=message,
            revision=branch,
            parent_commit=info.sha,
        )
        return Pushed(done.oid, done.commit_url, sent, removed)


def _same(content: Path | bytes, there: Any) -> bool:
    """Whether the Hub's entry of a tree is of this content."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    known = listed_hash(there)
    return bool(size == there.size) and content_hash(content, known) == known
