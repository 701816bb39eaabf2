"""Golden data from the original code, and artifacts made from it, shared by all tests."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a network
# As many threads here as in the processes that tests start: sums, and so samples, depend on it in their last bits.
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; read when Triton is imported

import numpy as np
import pytest
import stand_in
import stand_in_hub
import torch
from chromium import chromium
from huggingface_hub import constants
from numpy.typing import NDArray
from safetensors.torch import load_file

import cosyq
from cosyq import build
from cosyq.cli.main import run
from cosyq.recipe import find_recipe, load_recipe
from cosyq.voices.voice import Voice

REPOSITORY = Path(__file__).parent.parent
GOLDEN = REPOSITORY / "tests" / "golden" / "tiny-a"
MINI_SAYS = "Could you please turn down the music a little?"


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """What the original implementation computed from the golden checkpoint."""
    return load_file(GOLDEN / "expected.safetensors")


def make_artifact(
    output: Path,
    recipe: str,
    *overrides: str,
    source: Path = GOLDEN,
    force: bool = False,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Path:
    """Quantize as the command line does, from any folder; without voices, whose encoders the checkpoint lacks."""
    path = find_recipe(recipe)
    local = [f"source.path={source}", "source.repo=null", "source.revision=null", "source.sha256={}", "voices=[]"]
    loaded = load_recipe(path, [*local, *overrides])
    prepared = build.prepare(loaded, path.read_text("utf-8"))
    build.run(prepared, output, device, force=force, progress=lambda *_: None)
    return output


@pytest.fixture(scope="session")
def artifact_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The artifact of a shipped recipe over the golden checkpoint, made once; not to be changed."""
    made: dict[tuple[str, ...], Path] = {}

    def get(recipe: str, *overrides: str) -> Path:
        key = (recipe, *overrides)
        if key not in made:
            made[key] = make_artifact(tmp_path_factory.mktemp(recipe) / "artifact", recipe, *overrides)
        return made[key]

    return get


@pytest.fixture
def scratch_artifact(artifact_of: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the int8 artifact that a test may damage."""
    return Path(shutil.copytree(artifact_of("int8"), tmp_path / "artifact"))


@pytest.fixture
def scratch_checkpoint(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint that a test may damage."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def encoders_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for the checkpoint's encoders; not to be changed."""
    return stand_in.encoders(tmp_path_factory.mktemp("onnx") / "encoders")


@pytest.fixture
def whole_checkpoint(scratch_checkpoint: Path, encoders_folder: Path) -> Path:
    """A copy of the golden checkpoint with encoders, as the published one has them."""
    return Path(shutil.copytree(encoders_folder, scratch_checkpoint, dirs_exist_ok=True))


@pytest.fixture
def web(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[stand_in.Web]:
    """A small web server with TLS, which this process trusts; SSL_CERT_FILE=`tmp_path`/ca.pem lets others trust it."""
    with stand_in.web(tmp_path) as server:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        yield server


@pytest.fixture(scope="session")
def voice(golden: dict[str, torch.Tensor]) -> Voice:
    """A voice with a prompt of 25 tokens, from the golden streaming case."""
    return Voice(
        name="golden",
        speaker=golden["flow.stream_final.embedding"][0],
        prompt_tokens=golden["flow.stream_final.prompt_token"][0],
        prompt_mel=golden["flow.stream_final.prompt_feat"][0],
        transcript="hello there",
    )


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for what is downloaded in this process, as HF_HOME is for another; and downloading is allowed."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", folder / "assets")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[stand_in_hub.Hub]:
    """A Hub on loopback for the real client in this process: its address and patience are set to suit tests."""

    with stand_in_hub.hub() as server:
        server.tokens = {stand_in_hub.TOKEN: ("me", True), "hf_reader": ("me", False), "hf_other": ("other", True)}
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for module in ("utils._http", "file_download"):  # the client waits between its tries
            monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=lambda _: None))
        monkeypatch.setenv("HF_TOKEN", stand_in_hub.TOKEN)
        yield server


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, the Hub's client may not ask."""
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Callable[[], str]]:
    """A Chromium of its own for a test that is skipped where there is none."""
    with chromium(tmp_path) as page_socket:
        yield page_socket


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="session")
def mini_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cosyq-mini, quantized; not to be changed."""
    path, output = find_recipe("mini"), tmp_path_factory.mktemp("mini") / "mini"
    prepared = build.prepare(load_recipe(path), path.read_text("utf-8"))
    build.run(prepared, output, torch.device("cpu"), force=False, progress=lambda *_: None)
    return output


@pytest.fixture(scope="session")
def mini(mini_artifact: Path) -> cosyq.Synthesizer:
    """In float32, which is the same speech on every CPU."""
    return cosyq.load(mini_artifact, device="cpu", dtype="fp32", engine="unpacked")


@pytest.fixture(scope="session")
def mini_speech(mini: cosyq.Synthesizer) -> NDArray[np.float32]:
    """`MINI_SAYS` in the default voice, [n] at 24 kHz."""
    return mini.synthesize(MINI_SAYS, seed=0).samples


@pytest.fixture
def own_recognizer(tmp_path: Path) -> Callable[[str], str]:
    """What to name a user's own recognizer by, that answers with a Python expression of `language` and `path`."""

    def make(expression: str) -> str:
        script = tmp_path / "own recognizer.py"
        script.write_text(
            "import sys, wave\n"
            "for line in sys.stdin:\n"
            "    language, path = line.rstrip('\\n').split('\\t')\n"
            f"    print({expression}, flush=True)\n"
        )
        return f'command:{sys.executable} "{script}"'

    return make


def refused(result: tuple[int, str, str], code: int, *parts: str) -> str:
    """It failed with this code and one line of error that has these parts."""
    found, _, err = result
    assert found == code, err
    lines = err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in err
    assert stand_in_hub.TOKEN not in err
    assert len(lines) == 1 or code != 5 or lines[0].startswith(("source: ", "using "))
    for part in parts:
        assert part in lines[-1]
    return lines[-1]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over largest value, and RMS over RMS, whichever is worse."""
    assert found.shape == expected.shape
    difference = (found.double() - expected.double()).abs()
    largest = difference.max() / expected.double().abs().max()
    mean = difference.square().mean().sqrt() / expected.double().square().mean().sqrt()
    return max(largest.item(), mean.item())
