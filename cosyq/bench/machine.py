"""The machine: what it is called, what it does at best, and how much of its memory is taken."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from cosyq.bench.timing import Say, seconds

STATUS, CPUINFO, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/cpuinfo"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Probe:
    """`bytes` are more than any cache holds; matrices of `width` keep the whole device busy."""

    bytes: int
    width: int
    tries: int


PROBES = {"cuda": Probe(1 << 28, 8192, 20), "cpu": Probe(1 << 27, 1024, 5)}


@dataclass(frozen=True)
class Rates:
    """The most that was seen: bytes read or written by a copy, and operations of a product."""

    bytes_per_second: float
    operations_per_second: float


def rates(device: torch.device, dtype: torch.dtype, say: Say) -> Rates:
    """Copy and multiply until the device has shown what it can: a second or two."""
    probe = PROBES[device.type]
    say("what the device can do")
    return Rates(_copying(device, probe), _multiplying(device, dtype, probe))


def _copying(device: torch.device, probe: Probe) -> float:
    source = torch.zeros(probe.bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * probe.bytes / _fastest(lambda: target.copy_(source), device, probe.tries)


def _multiplying(device: torch.device, dtype: torch.dtype, probe: Probe) -> float:
    a = torch.randn(probe.width, probe.width, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * probe.width**3 / _fastest(lambda: torch.mm(a, a, out=out), device, probe.tries)


def _fastest(work: Callable[[], object], device: torch.device, tries: int) -> float:
    return min(seconds(work, device) for _ in range(tries))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", CPUINFO.read_text("utf-8", "replace"), re.M):
            return found[1].strip()
    return platform.processor() or platform.machine()


def library_versions() -> dict[str, str]:
    """Of what a figure depends on."""
    from cosyq import __version__

    found = {"cosyq": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


@dataclass(frozen=True)
class Memory:
    """Bytes: of a GPU what torch allocated and what it reserved for that, of a CPU what the process had resident.

    None where the system does not say.
    """

    used: int | None
    peak: int | None
    peak_reserved: int | None = None


def forget_peak(device: torch.device) -> None:
    """From here on, peaks are new."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        CLEAR_REFS.write_text("5")  # Linux: proc(5)


def memory(device: torch.device) -> Memory:
    if device.type == "cuda":
        peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return Memory(torch.cuda.memory_allocated(device), *peaks)
    try:
        fields = dict(re.findall(r"^(VmRSS|VmHWM):\s*(\d+) kB$", STATUS.read_text("utf-8"), re.M))
    except OSError:
        fields = {}
    return Memory(*(int(fields[name]) * 1024 if name in fields else None for name in ("VmRSS", "VmHWM")))
