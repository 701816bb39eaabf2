"""What is begun before the first kernel."""

import ctypes
import os
from types import SimpleNamespace

import pytest
import torch

from cosyq.kernels import start


def test_what_is_begun_is_begun_once(monkeypatch, capsys):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    start.begin_kernels.cache_clear()
    thread = start.begin_kernels(torch.device("cpu"), torch.float32)
    thread.join(60)
    assert not thread.is_alive()
    assert capsys.readouterr().err == ""
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "what was asked for stays"
    assert start.begin_kernels(torch.device("cpu"), torch.float32) is thread


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
    assert os.environ["CUDA_MODULE_LOADING"] == "as it was"


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
