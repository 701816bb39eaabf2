"""What is begun before the first kernel."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.cache import triton_key

from cosyq.kernels import start


def test_triton_has_hashed_itself_when_the_threads_are_done(monkeypatch, capsys):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("TRITON_STORE_BINARY_ONLY", "0")
    start.begin_kernels.cache_clear()
    triton_key.cache_clear()
    threads = start.begin_kernels(torch.device("cpu"), torch.float32)
    for thread in threads:
        thread.join(60)
    assert triton_key.cache_info().currsize == 1
    assert capsys.readouterr().err == ""
    asked = os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["TRITON_STORE_BINARY_ONLY"]
    assert asked == (":16:8", "0"), "what was asked for stays"
    assert start.begin_kernels(torch.device("cpu"), torch.float32) is threads


CHILD = """
import os, signal, time
from cosyq.kernels import start
start._gpu = lambda device: 0 if device == "cuda" else None
here, calls = os.getpid(), []
def key():
    calls.append(os.getpid())
    return IN_CHILD if os.getpid() != here else "asked here"
start._triton_key = key
start.begin_hash("cpu")
assert start._hashing is None
start.begin_hash("cuda")
start._hash()
from triton.runtime import cache
print(hasattr(cache.triton_key, "cache_info"), calls == [here], len(getattr(cache.triton_key, "cache_info", cache.triton_key)()))
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    print("gone")
"""


@pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) == 1, reason="where a process can be begun beside this one"
)
@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("'k' * 9000", "False False 9000"),
        ("1 / 0", "True True 4"),
        ("os.kill(os.getpid(), 9)", "True True 4"),
        ("os.write(4, b'half of it') and os.kill(os.getpid(), 9)", "True True 4"),
        ("'two\\nlines'", "False False 9"),
    ],
)
def test_a_child_hashes_triton_or_it_is_hashed_here(said, expected):
    code = CHILD.replace("IN_CHILD", said)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == (expected + "\ngone\n", "")


class Driver:
    """libcuda, as far as it is called: the device of `good` is there."""

    def __init__(self, good=0, broken=()):
        self.good, self.broken, self.retained = good, broken, []

    def __call__(self, name):
        assert name == "libcuda.so.1"
        return self

    def cuInit(self, flags):
        return 100 if "cuInit" in self.broken else 0

    def cuDeviceGet(self, device, index):
        device._obj.value = 7 + index
        return 0 if index == self.good else 101

    def cuDevicePrimaryCtxRetain(self, context, device):
        self.retained.append(device.value)
        context._obj.value = 1
        return 0


@pytest.fixture
def cuda_torch(monkeypatch, tmp_path):
    """A torch with CUDA, as far as its files tell."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libtorch_cuda.so").touch()
    found = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(start, "find_spec", lambda name: found)
    for name in start.VARIABLES:
        monkeypatch.setenv(name, "as it was")
    return tmp_path


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:3", 3)])
def test_the_context_is_made_on_the_device_that_is_asked_for(cuda_torch, monkeypatch, device, index):
    driver = Driver(good=index)
    monkeypatch.setattr(ctypes, "CDLL", driver)
    told = []
    start.begin_context(device, lambda *about: told.append(about)).join(10)
    assert driver.retained == [7 + index]
    assert [(cuda, bool(context)) for cuda, context in told] == [(driver, True)]
    assert os.environ["TRITON_BACKENDS_IN_TREE"] == "as it was"


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda:x", "cuda:-1", "tpu:0", ""])
def test_nothing_is_made_for_another_device(cuda_torch, device):
    assert start.begin_context(device) is None


@pytest.mark.parametrize("driver", [Driver(broken=["cuInit"]), Driver(good=5), OSError("no libcuda.so.1")])
def test_a_driver_that_fails_is_left_to_torch(cuda_torch, monkeypatch, driver, capsys):
    def library(name):
        if isinstance(driver, OSError):
            raise driver
        return driver

    monkeypatch.setattr(ctypes, "CDLL", library)
    told = []
    start.begin_context("cuda", lambda *about: told.append(about)).join(10)
    assert [bool(context) for _, context in told] == [False]
    assert getattr(driver, "retained", []) == []
    assert capsys.readouterr().err == ""


def test_a_torch_for_cpus_needs_no_context(cuda_torch, monkeypatch):
    (cuda_torch / "lib" / "libtorch_cuda.so").unlink()
    assert start.begin_context("auto") is None
    monkeypatch.setattr(start, "find_spec", lambda name: None)
    assert start.begin_context("auto") is None
