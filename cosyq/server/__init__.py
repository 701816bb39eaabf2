"""Speech over HTTP, as OpenAI's clients ask for it. Importing it loads no torch: a speaker brings that along."""

from collections.abc import Iterable
from importlib.util import find_spec

from cosyq.errors import UsageError

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "websockets")
ENCODING = ("av",)  # for all formats but wav and pcm
REMEDY = "install them with `pip install 'cosyq[serve]'`"


def missing(packages: Iterable[str] = PACKAGES) -> list[str]:
    """Those that are not here. None is imported."""
    return [name for name in packages if find_spec(name) is None]


def require_packages() -> None:
    """Raises UsageError where the extra that a server needs is not installed."""
    if gone := missing():
        raise UsageError(f"the server's packages are not here ({', '.join(gone)})", where="serve", remedy=REMEDY)
