"""The one place that imports bitsandbytes, when it is first needed: it takes seconds and pulls in torch's compiler."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType


@cache
def bitsandbytes() -> ModuleType:
    """The library, without its advice on optional kernels.

    Raises:
        ImportError: it is not installed; the command line names the remedy.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes as library

    return library
