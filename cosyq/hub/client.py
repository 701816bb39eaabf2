"""The Hub's client, for those that read and write: quiet, with one token, and its failures in one line each.

Nothing here asks a question, and the only token is the one in HF_TOKEN: a command does the same on every machine.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cosyq.errors import NetworkError, UsageError

AGAIN = "run it again: it goes on where it stopped"
REMEDIES = {
    401: "check the name; what is private, and a push, needs a valid HF_TOKEN",
    403: "the token in HF_TOKEN may not: it needs write access, and a repository of yours or your organization's",
    404: "check the name and the revision; what is private needs an HF_TOKEN that may read it",
    409: "somebody else was writing: push again",
    412: "somebody else was writing: push again",
    429: "too many requests: wait some minutes and run it again",
}


class OutOfReachError(NetworkError):
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
def client(where: str, remedy: str) -> Iterator[None]:
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
        raise OutOfReachError(
            f"the Hub is out of reach ({_line(cause or 'it cannot be reached')})", where=where, remedy=remedy
        ) from None
    except Exception as error:  # offline mode, DNS, TLS and time-outs come as types of the HTTP library in use
        cause = error
        while not isinstance(cause, HfHubHTTPError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise _refused(cause, where) from None
        what = "answered what is no answer" if isinstance(error, json.JSONDecodeError) else "is out of reach"
        raise OutOfReachError(f"the Hub {what} ({_line(error)})", where=where, remedy=remedy) from None


def _refused(error: Any, where: str) -> NetworkError:
    status = error.response.status_code
    said = getattr(error, "server_message", None)
    what = f"the Hub answered {status}" + (f" ({_line(said)})" if said else "")
    if status in (408, 429) or status >= 500:
        return OutOfReachError(what, where=where, remedy=REMEDIES.get(status, AGAIN))
    return NetworkError(what, where=where, remedy=REMEDIES.get(status))


def _line(said: object) -> str:
    """The first line of a message, which may be a server's, without what would steer a terminal."""
    first = next(iter(str(said).strip().splitlines()), "") or type(said).__name__
    return "".join(character for character in first if character.isprintable())[:160]


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
    with client(repo, ""):
        api = HfApi(token=known or False)
        api.model_info(repo)
        return str(api.whoami()["name"]) if known else None


def files_folder() -> Path:
    """Where single files are kept: a folder of HF_HOME; it is made if it is missing."""
    from huggingface_hub import cached_assets_path

    return Path(cached_assets_path("cosyq", "files"))


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
