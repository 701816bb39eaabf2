"""What this machine has of what cosyq needs: looked at, never changed, and without a network unless asked."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cosyq import __version__
from cosyq.errors import NetworkError
from cosyq.hub.client import cache_folder, reach, token
from cosyq.kernels import store

# What the published model takes at most: 3.3 GB of memory to quantize (docs/numbers.md) and the rest of a system beside
# it; 4.4 GB to download; 2.9 GB to keep as fp32.
MEMORY, DOWNLOAD, ARTIFACT = 4_000_000_000, 4_400_000_000, 2_900_000_000
DRIVER = Path("/proc/driver/nvidia/version")
MEMINFO = Path("/proc/meminfo")
PACKAGES = {
    "bitsandbytes": "quantizing, and the bnb engine",
    "huggingface_hub": "the Hub",
    "jinja2": "pages of evaluations",
    "kaldi-native-fbank": "making voices",
    "numpy": "everything",
    "onnxruntime": "making voices",
    "pydantic": "recipes",
    "pyyaml": "recipes",
    "rich": "the command line",
    "safetensors": "artifacts",
    "soundfile": "reading and writing audio",
    "soxr": "resampling recordings",
    "tokenizers": "text",
    "torch": "everything",
    "typer": "the command line",
    "wetext": "numbers and symbols in text",
}


@dataclass(frozen=True)
class Check:
    """One thing looked at. `missing`: something will not work; `note`: it may matter. `remedy` says what to do."""

    name: str
    status: Literal["ok", "note", "missing"]
    found: str
    remedy: str = ""


def examine(*, ask_hub: bool) -> Iterator[Check]:
    """Every check in turn; the Hub is asked only when wanted."""
    yield Check("cosyq", "ok", f"{__version__}, Python {platform.python_version()}, {platform.machine()}")
    yield from map(_package, PACKAGES)
    yield from _compute()
    yield _memory()
    yield from _disk()
    yield _token()
    if ask_hub:
        yield _reach()


def _package(name: str) -> Check:
    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "missing", f"not installed; for {PACKAGES[name]}", f"pip install {name}")


def _compute() -> Iterator[Check]:
    driver = _driver()
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its libraries is not there
        yield Check("cuda", "missing", f"torch cannot be imported ({error})", "install torch again: pytorch.org")
        return
    if torch.cuda.is_available():
        yield Check("cuda", "ok", f"CUDA {torch.version.cuda}, driver {driver or 'of unknown version'}")
        for index in range(torch.cuda.device_count()):
            yield _gpu(torch.cuda.get_device_properties(index), index)
        yield _compiler()
        yield _kernel_cache()
    elif driver is None:
        yield Check("cuda", "ok", "no NVIDIA driver: everything runs on the CPU")
    elif torch.version.cuda is None:
        yield Check(
            "cuda", "note", f"driver {driver}, but torch is built for the CPU", "install torch for CUDA: pytorch.org"
        )
    else:
        found = f"driver {driver}, but torch's CUDA {torch.version.cuda} finds no GPU"
        yield Check("cuda", "note", found, "update the driver, or see that CUDA_VISIBLE_DEVICES names a GPU")


def _gpu(about: Any, index: int) -> Check:
    return Check(
        f"cuda:{index}",
        "ok",
        f"{about.name}, {about.total_memory / 1e9:.1f} GB, compute capability {about.major}.{about.minor}",
    )


def _compiler() -> Check:
    """What makes kernels for the GPU when they are first needed."""
    try:
        found = f"triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        return Check("kernels", "note", "triton is not installed: the slower engines are used", "pip install triton")
    compiler = next((name for name in (os.environ.get("CC"), "gcc", "clang") if name and shutil.which(name)), None)
    if compiler is None:
        return Check("kernels", "note", f"{found}, but no C compiler, which it needs", "install gcc, or name one in CC")
    return Check("kernels", "ok", f"{found}, {compiler}")


def _kernel_cache() -> Check:
    """Where they are kept from one start to the next."""
    if (folder := store.folder()) is None:
        what = "there is no home"
    elif not (existing := _existing(folder)).is_dir() or not os.access(existing, os.W_OK):
        what = f"{folder} cannot be written"
    else:
        return Check("kernels cache", "ok", f"{sum(1 for _ in folder.glob('*.kernel'))} in {folder}")
    found = f"{what}: kernels are looked for in Triton's cache at every start, or compiled"
    return Check("kernels cache", "note", found, "name a folder that is kept in XDG_CACHE_HOME")


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def _driver() -> str | None:
    """The NVIDIA driver's version, as the kernel says it."""
    try:
        first = DRIVER.read_text("utf-8").splitlines()[0]
    except (OSError, UnicodeDecodeError, IndexError):
        return None
    return next((word for word in first.split() if word[:1].isdigit()), first)


def _memory() -> Check:
    """What the kernel could give, without swapping."""
    try:
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text("utf-8").splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError, IndexError):
        return Check("memory", "note", "unknown here", f"the published model takes up to {MEMORY / 1e9:.0f} GB")
    found = f"{available / 1e9:.1f} GB available"
    if available >= MEMORY:
        return Check("memory", "ok", found)
    return Check("memory", "note", found, f"the published model takes up to {MEMORY / 1e9:.0f} GB; cosyq-mini far less")


def _disk() -> Iterator[Check]:
    folders = [("disk for artifacts", Path.cwd(), ARTIFACT)]
    with suppress(ImportError):  # which was said above
        folders.append(("disk for downloads", cache_folder(), DOWNLOAD))
    for name, folder, needed in folders:
        existing = _existing(folder)
        free = shutil.disk_usage(existing).free
        found = f"{free / 1e9:.1f} GB free in {folder}"
        if not os.access(existing, os.W_OK):
            yield Check(name, "note", f"{folder} cannot be written", "use another folder, of downloads with HF_HOME")
        elif free < needed:
            yield Check(name, "note", found, f"the published model takes up to {needed / 1e9:.1f} GB there")
        else:
            yield Check(name, "ok", found)


def _token() -> Check:
    try:
        there = token() is not None
    except NetworkError as error:
        return Check("HF_TOKEN", "missing", error.what, "set it to a token as huggingface.co/settings/tokens shows it")
    if there:
        return Check("HF_TOKEN", "ok", "set")
    return Check("HF_TOKEN", "ok", "not set: needed for pushing, and for what is private")


def _reach() -> Check:
    from cosyq.recipe import find_recipe, load_recipe

    repo = load_recipe(find_recipe("int8")).source.repo
    assert repo is not None
    try:
        user = reach(repo)
    except NetworkError as error:
        return Check("hub", "missing", str(error), error.remedy or "see whether a proxy is needed: HTTPS_PROXY")
    return Check("hub", "ok", f"has {repo}" + (f"; HF_TOKEN is {user}'s" if user else ""))
