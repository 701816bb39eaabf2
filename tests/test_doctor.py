"""cosyq doctor: it finds what is missing, says what to do, and shows no secret."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY
from stand_in_hub import TOKEN, Repository

from cosyq import __version__, doctor
from cosyq.kernels import store

SOURCE = "FunAudioLLM/Fun-CosyVoice3-0.5B-2512"


@pytest.fixture
def checks(cli):
    """Run the doctor; returns (exit code, checks by name)."""

    def call(*options):
        code, out, _ = cli("doctor", "--json", *options)
        report = json.loads(out)
        assert report["ok"] == (code == 0)
        return code, {check["name"]: SimpleNamespace(**check) for check in report["checks"]}

    return call


def test_it_knows_every_dependency():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]} == doctor.PACKAGES.keys()


def test_nothing_is_missing_here(cli, checks):
    code, found = checks()
    assert code == 0
    assert found["torch"].found == torch.__version__
    assert "hub" not in found  # which is asked only when told to
    code, out, err = cli("doctor")
    assert (code, err) == (0, "nothing is missing\n")
    assert len(out.splitlines()) == len(found)


def test_what_is_missing_has_a_remedy(checks, cli, monkeypatch):
    version = importlib.metadata.version

    def without(name):
        if name in ("wetext", "onnxruntime"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    code, found = checks()
    assert code == 4
    assert [name for name, check in found.items() if check.status == "missing"] == ["onnxruntime", "wetext"]
    assert found["wetext"].remedy == "pip install wetext"
    assert cli("doctor")[2] == "missing: onnxruntime, wetext\n"


def test_it_runs_where_nothing_else_does():
    """Without torch, numpy, yaml and the Hub's client: a broken installation is what it is for."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'yaml', 'huggingface_hub', 'numpy', 'wetext']));"
        "from cosyq.cli.main import run; sys.exit(run(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert "missing\tcuda\ttorch cannot be imported" in done.stdout
    assert done.stderr == "missing: cuda\n"


def test_gpu_and_driver(checks, monkeypatch, tmp_path):
    driver = tmp_path / "version"
    monkeypatch.setattr(doctor, "DRIVER", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert checks()[1]["cuda"].found == "no NVIDIA driver: everything runs on the CPU"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\nGCC version: 12\n")
    found = checks()[1]["cuda"]
    assert (found.status, found.found) == ("note", "driver 580.65.06, but torch is built for the CPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "update the driver" in checks()[1]["cuda"].remedy
    about = SimpleNamespace(name="NVIDIA H100", total_memory=85_000_000_000, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
    code, found = checks()
    assert code == 0
    assert found["cuda"].found == "CUDA 13.0, driver 580.65.06"
    assert found["cuda:1"].found == "NVIDIA H100, 85.0 GB, compute capability 9.0"


def test_what_compiles_kernels_and_where_they_are_kept(checks, monkeypatch, tmp_path):
    assert "kernels" not in checks()[1]  # which a CPU has none of
    about = SimpleNamespace(name="NVIDIA H100", total_memory=85_000_000_000, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store.folder.cache_clear()
    kept = store.folder()
    assert kept.is_relative_to(tmp_path / "cache" / "cosyq")
    kept.mkdir(parents=True)
    (kept / "step.kernel").write_bytes(b"")
    monkeypatch.setenv("CC", sys.executable)
    code, found = checks()
    assert code == 0
    assert found["kernels"].found == f"triton {importlib.metadata.version('triton')}, {sys.executable}"
    assert (found["kernels cache"].status, found["kernels cache"].found) == ("ok", f"1 in {kept}")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    store.folder.cache_clear()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    code, found = checks()
    assert code == 0
    assert "no C compiler" in found["kernels"].found
    assert (found["kernels cache"].status, found["kernels cache"].remedy[-16:]) == ("note", "n XDG_CACHE_HOME")
    version = importlib.metadata.version

    def without(name):
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    assert checks()[1]["kernels"].remedy == "pip install triton"


def test_memory_and_disk_that_will_not_do_are_noted(checks, monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    1000000 kB\n")
    monkeypatch.setattr(doctor, "MEMINFO", tmp_path / "meminfo")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 3_000_000_000))
    code, found = checks()
    assert code == 0
    assert (found["memory"].status, found["memory"].found) == ("note", "1.0 GB available")
    assert found["disk for artifacts"].status == "ok"
    assert (found["disk for downloads"].status, found["disk for downloads"].remedy[-12:]) == ("note", "4.4 GB there")


def test_the_token_is_never_shown(cli, checks, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert checks()[1]["HF_TOKEN"].found == "set"
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN} x")
    code, found = checks()
    assert (code, found["HF_TOKEN"].status) == (4, "missing")
    for options in ((), ("--json",)):
        _, out, err = cli("doctor", *options)
        assert TOKEN not in out + err


def test_the_hub_when_asked(hub, checks, offline, monkeypatch):
    code, found = checks("--hub")
    assert (code, found["hub"].status) == (5, "missing")
    assert "the Hub answered 404" in found["hub"].found
    hub.repositories[SOURCE] = Repository()
    hub.repositories[SOURCE].commit("main", {})
    code, found = checks("--hub")
    assert (code, found["hub"].found) == (0, f"has {SOURCE}; HF_TOKEN is me's")
    monkeypatch.delenv("HF_TOKEN")
    assert checks("--hub")[1]["hub"].found == f"has {SOURCE}"
    offline()
    hub.requests.clear()
    code, found = checks("--hub")
    assert code == 5
    assert "the Hub is out of reach" in found["hub"].found
    assert hub.requests == []


def test_version_and_completion(cli):
    assert cli("--version") == (0, f"cosyq {__version__}\n", "")
    command = [sys.executable, "-c", "from cosyq.cli import main; import sys; sys.argv[0] = 'cosyq'; main()"]
    asked = {"_COSYQ_COMPLETE": "complete_bash", "COMP_WORDS": "cosyq pu", "COMP_CWORD": "1"}
    done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True)
    assert done.stdout.split() == ["push", "pull"]
    script = subprocess.run([*command, "--show-completion", "bash"], capture_output=True, text=True)
    assert "_COSYQ_COMPLETE=complete_bash" in script.stdout
