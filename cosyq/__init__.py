"""cosyq: Fun-CosyVoice3 quantized once into a small artifact, and spoken from it.

    import cosyq
    tts = cosyq.load("artifacts/fun-cosyvoice3-0.5b-int8")  # or hf://REPO[@REV]
    audio = tts.synthesize("Hello.", seed=7)

Importing this package loads nothing heavy; torch comes with the first use of a name that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Audio", "Synthesizer", "__version__", "load"]

if TYPE_CHECKING:
    from pathlib import Path

    from cosyq.artifact.reader import Artifact
    from cosyq.runtime.synthesizer import Audio, Synthesizer


def load(artifact: str | Path | Artifact, **options: Any) -> Synthesizer:
    """Open an artifact and put it on a device, as `cosyq.runtime.synthesizer.load` does; one of the Hub is fetched.

    Args:
        artifact: a folder, an artifact that was opened already, or hf://REPO[@REV], which is fetched where the cache
            lacks it.
        options: device, dtype, engine.

    Raises:
        ArtifactError: it is missing, damaged or too new.
        NetworkError: it cannot be fetched.
        UsageError: the reference is none.
        DeviceError: the device is missing or too small.
    """
    from cosyq.runtime import synthesizer

    if isinstance(artifact, str) and artifact.startswith("hf://"):
        from cosyq.publish.pull import locate

        artifact = locate(artifact).folder
    return synthesizer.load(artifact, **options)


def __getattr__(name: str) -> Any:
    if name in __all__:
        from cosyq.runtime import synthesizer

        return getattr(synthesizer, name)
    raise AttributeError(f"module 'cosyq' has no attribute {name!r}")
