"""repo@revision -> a local folder. The only module that talks to a network, through huggingface_hub.

Only the files that a build needs are fetched: about 3.4 of the repository's 9.8 GB.
"""

from __future__ import annotations

from pathlib import Path

from cosyq.errors import NetworkError


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
