"""What a server may be told, once, at its start."""

from __future__ import annotations

from dataclasses import dataclass

PREFIX = "COSYQ_"


@dataclass(frozen=True)
class Settings:
    """Lengths in characters or bytes, times in seconds.

    max_sample: of a recording that becomes a voice.
    fixed_voices: none is added or removed over HTTP.
    keys: whoever has one of them may speak; without any, everyone may.
    public_lists: whether models and voices are listed without a key.
    longest_queue: requests that wait; one more is refused.
    key_concurrency: requests of one key that are answered at once; None is any number.
    wait_seconds: how long each of them waits at most.
    deadline_seconds: from a request's arrival to its last byte.
    drain_seconds: after a signal to stop, for what is still spoken.
    """

    keys: tuple[str, ...] = ()
    public_lists: bool = True
    max_characters: int = 4096
    max_body: int = 256 << 10
    max_sample: int = 10 << 20
    fixed_voices: bool = False
    longest_queue: int = 32
    key_concurrency: int | None = None
    wait_seconds: float = 20.0
    deadline_seconds: float = 300.0
    drain_seconds: float = 30.0


def quantization(environment: dict[str, str]) -> frozenset[str] | None:
    """The weight formats that QUANTIZATION_ENABLED and QUANTIZATION_BITS (8 or 4) ask for; None is any.

    Raises:
        ValueError: with the name of the variable that is neither.
    """
    enabled, bits = environment.get("QUANTIZATION_ENABLED"), environment.get("QUANTIZATION_BITS")
    if enabled is not None and enabled.lower() not in ("1", "true", "yes", "on", "0", "false", "no", "off", ""):
        raise ValueError("QUANTIZATION_ENABLED")
    if enabled is not None and enabled.lower() in ("0", "false", "no", "off"):
        return frozenset({"bf16", "fp16", "fp32"})
    if bits not in (None, "", "8", "4"):
        raise ValueError("QUANTIZATION_BITS")
    if not enabled and not bits:
        return None
    return frozenset({"4": {"nf4", "fp4"}, "8": {"int8"}}.get(bits or "", {"int8", "nf4", "fp4"}))
