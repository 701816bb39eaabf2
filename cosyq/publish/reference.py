"""How a command line names an artifact of the Hub: hf://REPO[@REV]."""

from __future__ import annotations

import re

from cosyq.errors import UsageError

SCHEME = "hf://"
_REFERENCE = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w.-][\w./-]{0,199}))?", re.ASCII)


def parse(reference: str) -> tuple[str, str]:
    """`REPO[@REV]`, with or without hf://, as (repository, revision); main where none is named.

    Raises:
        UsageError: it is neither.
    """
    match = _REFERENCE.fullmatch(reference.removeprefix(SCHEME))
    if not match or ".." in match[0]:
        raise UsageError("expected OWNER/NAME or OWNER/NAME@REVISION", where=reference[:200])
    return match[1], match[2] or "main"
