"""The only module that talks to a network: repositories of the Hub, read and written, and single files of the web.

Of a repository, through huggingface_hub, only the files that are needed are fetched, or sent. Nothing here asks a
question, and the only token is the one in HF_TOKEN: a command does the same on every machine.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosyq.errors import NetworkError, UsageError

COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_FILE_BYTES = 32 << 20  # thirty seconds of speech are 3 MB as most recorders write them
SECONDS_TO_ANSWER, SECONDS_IN_ALL = 10, 60
AGAIN = "run it again: it goes on where it stopped"
REMEDIES = {
    401: "check the name; what is private, and a push, needs a valid HF_TOKEN",
    403: "the token in HF_TOKEN may not: it needs write access, and a repository of yours or your organization's",
    404: "check the name and the revision; what is private needs an HF_TOKEN that may read it",
    409: "somebody else was writing: push again",
    412: "somebody else was writing: push again",
    429: "too many requests: wait some minutes and run it again",
}


# ---- repositories, read


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
    with _client(where, remedy):
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
        with _client(where, remedy):
            cached = try_to_load_from_cache(repo, name, revision=revision)
            if COMMIT.fullmatch(revision) and isinstance(cached, str):
                return Path(cached)
            about = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision), token=known)
            if about.size is None or about.size > limit:
                raise NetworkError(f"{name} has {about.size} bytes, at most {limit} are expected", where=where)
            return Path(hf_hub_download(repo, name, revision=revision, token=known))
    except _OutOfReachError:
        if isinstance(cached, str):
            return Path(cached)
        raise


# ---- repositories, written


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
    with _client(where, AGAIN):
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
    """Whether the Hub's entry of a tree is of this content: large files go by their sha256, others by git's hash."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if size != there.size:
        return False

    def git_hash() -> Any:
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)

    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        found = hashlib.file_digest(file, hashlib.sha256 if there.lfs else git_hash).hexdigest()
    return bool(found == (there.lfs.sha256 if there.lfs else there.blob_id))


def cache_folder() -> Path:
    """Where downloads are kept: HF_HUB_CACHE, or a folder of HF_HOME."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def reach(repo: str) -> str | None:
    """Ask the Hub for a repository; whose HF_TOKEN is, None where it is not set.

    Raises:
        NetworkError: it cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    known = token()
    with _client(repo, ""):
        api = HfApi(token=known or False)
        api.model_info(repo)
        return str(api.whoami()["name"]) if known else None


# ---- the client


class _OutOfReachError(NetworkError):
    """No answer, or none that says anything about what was asked."""


def token() -> str | None:
    """HF_TOKEN, None where it is not set.

    Raises:
        NetworkError: it cannot be one. It is not shown.
    """
    found = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", found):
        raise NetworkError("not a token: it has spaces or letters that no token has", where="HF_TOKEN")
    return found or None


@contextmanager
def _client(where: str, remedy: str) -> Iterator[None]:
    """Around calls of huggingface_hub: quiet where nobody looks, and whatever it raises becomes one line."""
    from huggingface_hub import utils
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    utils.logging.set_verbosity_error()  # its warnings show signed addresses
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    try:
        yield
    except NetworkError:
        raise
    except HFValidationError as error:
        raise UsageError(f"not a repository's name ({_line(error)})", where=where) from None
    except LocalEntryNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise _refused(cause, where) from None
        raise _OutOfReachError(
            f"the Hub is out of reach ({_line(cause or 'it cannot be reached')})", where=where, remedy=remedy
        ) from None
    except Exception as error:  # offline mode, DNS, TLS and time-outs come as types of the HTTP library in use
        cause = error
        while not isinstance(cause, HfHubHTTPError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise _refused(cause, where) from None
        what = "answered what is no answer" if isinstance(error, json.JSONDecodeError) else "is out of reach"
        raise _OutOfReachError(f"the Hub {what} ({_line(error)})", where=where, remedy=remedy) from None


def _refused(error: Any, where: str) -> NetworkError:
    status = error.response.status_code
    said = getattr(error, "server_message", None)
    what = f"the Hub answered {status}" + (f" ({_line(said)})" if said else "")
    if status in (408, 429) or status >= 500:
        return _OutOfReachError(what, where=where, remedy=REMEDIES.get(status, AGAIN))
    return NetworkError(what, where=where, remedy=REMEDIES.get(status))


def _line(said: object) -> str:
    """The first line of a message, which may be a server's, without what would steer a terminal."""
    first = next(iter(str(said).strip().splitlines()), "") or type(said).__name__
    return "".join(character for character in first if character.isprintable())[:160]


# ---- single files of the web


def fetch_file(url: str, sha256: str) -> Path:
    """A file of at most `MAX_FILE_BYTES` from the web, kept in the Hub's cache under its hash: asked for only once.

    Nothing is written before the content is known to be the one that `sha256` names.

    Raises:
        NetworkError: the server cannot be reached or refuses, or sends too much or something else.
    """
    from huggingface_hub import cached_assets_path, constants

    try:
        kept = Path(cached_assets_path("cosyq", "files")) / sha256
        if kept.is_file() and _sha256(kept.read_bytes()) == sha256:
            return kept
        if constants.HF_HUB_OFFLINE:
            raise NetworkError("not in the cache, and HF_HUB_OFFLINE is set", where=url)
        data = _download(url)
        if _sha256(data) != sha256:
            raise NetworkError(
                f"sha256 is {_sha256(data)}, the recipe pins {sha256}",
                where=url,
                remedy="it changed there; do not use it before you know why",
            )
        _keep(kept, data)
        return kept
    except (OSError, ValueError) as error:  # of the cache: a download's own are told where they happen
        raise NetworkError(
            f"cannot be kept ({error})", where=url, remedy="name a folder with room in HF_HOME"
        ) from None


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.startswith("https://"):
            raise NetworkError(f"redirects to {newurl[:160]!r}, which is not https", where=request.full_url)
        return super().redirect_request(request, fp, code, msg, headers, newurl)


def _download(url: str) -> bytes:
    deadline = time.monotonic() + SECONDS_IN_ALL
    request = urllib.request.Request(url, headers={"User-Agent": "cosyq"})
    data = bytearray()
    try:
        with urllib.request.build_opener(_HttpsOnly).open(request, timeout=SECONDS_TO_ANSWER) as response:
            while block := response.read1(1 << 16):
                data += block
                if max(len(data), response.length or 0) > MAX_FILE_BYTES:
                    raise NetworkError(f"more than {MAX_FILE_BYTES >> 20} MB", where=url)
                if time.monotonic() > deadline:
                    raise NetworkError(f"not there after {SECONDS_IN_ALL} s", where=url)
            if response.length:
                raise NetworkError(f"ended {response.length} bytes too early", where=url, remedy="try again")
    except urllib.error.HTTPError as error:
        raise NetworkError(f"the server answered {error.code}", where=url) from None
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: a name that no host can have
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise NetworkError(f"cannot be fetched ({reason[:160]})", where=url) from None
    return bytes(data)


def _keep(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


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
