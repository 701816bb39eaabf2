"""repo@revision -> a local folder, an https:// address -> a local file. The only module that talks to a network.

Of a repository, through huggingface_hub, only the files that a build needs are fetched: about 3.4 of 9.8 GB.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from cosyq.errors import NetworkError

MAX_FILE_BYTES = 32 << 20  # thirty seconds of speech are 3 MB as most recorders write them
SECONDS_TO_ANSWER, SECONDS_IN_ALL = 10, 60


def fetch(repo: str, revision: str, wanted: list[tuple[str, ...]]) -> Path:
    """The folder of a snapshot that holds, of each tuple of alternatives, the first that the repository has.

    A complete snapshot in the local cache is used without asking the Hub.

    Raises:
        NetworkError: the Hub cannot be reached, refuses, or lacks a file.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    cached = _cached(repo, revision, wanted)
    if cached:
        return cached
    where = f"{repo}@{revision}"
    try:
        present = set(HfApi().list_repo_files(repo, revision=revision))
        chosen = [next((name for name in names if name in present), None) for names in wanted]
        lacking = [names[-1] for names, found in zip(wanted, chosen, strict=True) if found is None]
        if lacking:
            raise NetworkError(f"the repository lacks {', '.join(lacking)}", where=where)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[name for name in chosen if name]))
    except NetworkError:
        raise
    except LocalEntryNotFoundError:
        raise _unreachable(where, "it cannot be reached") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "?")
        raise NetworkError(f"the Hub answered {status}", where=where, remedy="check the name and HF_TOKEN") from None
    except Exception as error:  # offline mode, DNS, TLS and time-outs come as types of the HTTP library in use
        raise _unreachable(where, str(error) or type(error).__name__) from None


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


def _cached(repo: str, revision: str, wanted: list[tuple[str, ...]]) -> Path | None:
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


def _unreachable(where: str, reason: str) -> NetworkError:
    first = reason.splitlines()[0][:160]
    return NetworkError(
        f"the Hub is out of reach ({first})", where=where, remedy="give a local checkpoint with --source DIR"
    )
