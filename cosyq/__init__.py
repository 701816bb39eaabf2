"""cosyq: Fun-CosyVoice3 quantized once into a small artifact, and spoken from it.

    import cosyq
    tts = cosyq.load("artifacts/fun-cosyvoice3-0.5b-int8")
    audio = tts.synthesize("Hello.", seed=7)

Importing this package loads nothing heavy; torch comes with the first use of a name that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Audio", "Synthesizer", "__version__", "load"]

if TYPE_CHECKING:
    from cosyq.runtime.synthesizer import Audio, Synthesizer, load


def __getattr__(name: str) -> Any:
    if name in __all__:
        from cosyq.runtime import synthesizer

        return getattr(synthesizer, name)
    raise AttributeError(f"module 'cosyq' has no attribute {name!r}")
