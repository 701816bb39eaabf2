"""What the CUDA driver is told."""

import ctypes
import struct

import pytest
import torch

from cosyq.kernels import driver
from cosyq.kernels.store import Binary

BINARY = Binary("attend_kernel", 1024, 4, True, ("Q", "", "i", "f", "q"), b"\x7fELF")


class Driver:
    """libcuda, as far as it is called: a kernel that takes `sizes` bytes; `codes` are answered to launches."""

    def __init__(self, sizes, codes=()):
        self.sizes, self.codes, self.calls, self.launched = sizes, list(codes), [], []

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            return 0

        return call

    def cuModuleGetFunction(self, function, module, name):
        self.calls.append(name.decode())
        function._obj.value = 77
        return 0

    def cuFuncSetAttribute(self, function, attribute, value):
        self.calls.append((attribute, value))
        return 0

    def cuFuncGetParamInfo(self, function, index, offset, size):
        if index.value >= len(self.sizes):
            return 1
        size._obj.value = self.sizes[index.value]
        return 0

    def cuGetErrorName(self, code, name):
        name._obj.value = b"CUDA_ERROR_LAUNCH_FAILED"
        return 0

    def cuLaunchKernelEx(self, config, function, parameters, extra):
        if self.codes and (code := self.codes.pop(0)):
            return code
        c, values = config._obj, []
        for address, size in zip(parameters, self.sizes, strict=True):
            values.append(ctypes.string_at(address, size))
        overlaps = c.attribute_count and (c.attributes[0].id, bytes(c.attributes[0])[8:12])
        about = [*c.grid], [*c.block], c.shared, c.stream, overlaps, function.value
        self.launched.append((about, values))
        return 0


@pytest.fixture
def answer(monkeypatch):
    def answer(*arguments):
        there = Driver(*arguments)
        monkeypatch.setattr(driver, "_driver", lambda: there)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 1000 + device, raising=False)
        return there

    return answer


def test_a_kernel_gets_its_arguments(answer):
    there = answer([8, 4, 4, 8, 8, 8])
    tensor = torch.zeros(3)
    launch = driver.load(BINARY, 1)
    assert there.calls[-2:] == ["attend_kernel", "cuFuncLoad"]
    launch((5, 6), (tensor, 64, -7, 0.5, 2**40))
    ((about, values),) = there.launched
    assert about == ([5, 6, 1], [128, 1, 1], 1024, 1001, (6, b"\1\0\0\0"), 77)
    expected = [("Q", tensor.data_ptr()), ("i", -7), ("f", 0.5), ("q", 2**40), ("Q", 0), ("Q", 0)]
    assert values == [struct.pack(kind, value) for kind, value in expected]


def test_one_that_takes_nothing_and_waits(answer):
    there = answer([])
    driver.load(Binary("k", 0, 8, False, ("",), b""), 0)((1,), (1,))
    assert there.launched == [(([1, 1, 1], [256, 1, 1], 0, 1000, 0, 77), [])]


def test_much_shared_memory_is_asked_for(answer):
    there = answer([8, 4, 4, 8])
    driver.load(Binary("k", 100_000, 4, True, BINARY.takes, b""), 0)
    assert (8, 100_000) in there.calls
    assert ctypes.sizeof(driver._Attribute) == 72
    assert ctypes.sizeof(driver._Config) == 56


@pytest.mark.parametrize("sizes", [[8, 4, 4], [8, 8, 4, 8], [8, 4, 4, 8, 4], []])
def test_one_that_takes_something_else_is_refused(answer, sizes):
    answer(sizes)
    with pytest.raises(ValueError, match="attend_kernel takes"):
        driver.load(BINARY, 0)


def test_a_thread_that_has_no_context_gets_one(answer):
    there = answer([8, 4, 4, 8], [driver.INVALID_CONTEXT])
    launch = driver.load(BINARY, 0)
    there.calls.clear()
    launch((1, 1, 1), (torch.zeros(1), 0, 0, 0.0, 0))
    assert there.calls == ["cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]
    assert len(there.launched) == 1


def test_what_fails_is_an_error_of_the_device(answer):
    answer([8, 4, 4, 8], [719])
    launch = driver.load(BINARY, 0)
    with pytest.raises(RuntimeError, match="CUDA error: cuLaunchKernelEx: CUDA_ERROR_LAUNCH_FAILED"):
        launch((1,), (torch.zeros(1), 0, 0, 0.0, 0))
