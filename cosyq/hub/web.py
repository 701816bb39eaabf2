"""Single files of the web: over https, in bounds of size and time, kept under their hash."""

from __future__ import annotations

import hashlib
import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from cosyq.errors import ArtifactError, NetworkError
from cosyq.files import whole_file
from cosyq.hub.client import files_folder, offline

MAX_FILE_BYTES = 32 << 20  # thirty seconds of speech are 3 MB as most recorders write them
SECONDS_TO_ANSWER, SECONDS_IN_ALL = 10, 60


def fetch_file(url: str, sha256: str) -> Path:
    """A file of at most `MAX_FILE_BYTES` from the web, kept in the Hub's cache under its hash: asked for only once.

    Nothing is written before the content is known to be the one that `sha256` names.

    Raises:
        NetworkError: the server cannot be reached or refuses, or sends too much or something else.
    """
    try:
        kept = files_folder() / sha256
        if kept.is_file() and _sha256(kept.read_bytes()) == sha256:
            return kept
        if offline():
            raise NetworkError("not in the cache, and HF_HUB_OFFLINE is set", where=url)
        data = _download(url)
        if _sha256(data) != sha256:
            raise NetworkError(
                f"sha256 is {_sha256(data)}, the recipe pins {sha256}",
                where=url,
                remedy="it changed there; do not use it before you know why",
            )
        with whole_file(kept) as partial:
            partial.write_bytes(data)
        return kept
    except (OSError, ValueError, ArtifactError) as error:  # of the cache: a download's own are told where they happen
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


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
