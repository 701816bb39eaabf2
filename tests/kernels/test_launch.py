"""Kernels that are compiled once, for an H100 that is not there, and found again by a process that has no compiler."""

import os
import subprocess
import sys

import pytest
import torch

from cosyq.kernels.launch import UNKNOWN, Kernel, _kind, cdiv, next_power_of_2

SCRIPT = """
import sys, threading, torch
from cosyq.kernels import driver, launch, store

class OnGpu(torch.Tensor):
    device = torch.device("cuda", 0)

def on_gpu(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype).as_subclass(OnGpu)

attempts = []
def load(binary, device):
    assert device == 0 and binary.code[:4] == b"\\x7fELF", binary
    def launch(grid, arguments):
        passed = [kind + ("" if kind == "Q" else repr(x)) for kind, x in zip(binary.takes, arguments, strict=True) if kind]
        attempts[-1].append((binary.name, tuple(grid), binary.warps, binary.shared, binary.overlaps, passed))
    return launch
driver.load = load
torch.cuda.get_device_capability = lambda device=None: (9, 0)

if sys.argv[1] != "find":
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver as triton_driver
    class Driver:
        def get_current_target(self): return GPUTarget("cuda", 90, 32)
        def get_current_device(self): return 0
        def get_current_stream(self, device=None): return 0
    triton_driver.set_active(Driver())
else:
    sys.modules["triton"] = None  # it cannot be imported

from cosyq.kernels import dit
from cosyq.kernels.decode import _output, matrix, pointers, Heads, Tile
from cosyq.kernels.packed import int8_rows
kept, by = store.keep, set()
def keep(named, binary):
    by.add(threading.current_thread().name.partition("_")[0])
    kept(named, binary)
store.keep = keep

def work():
    attempts.append([])
    now, table = on_gpu(3, dtype=torch.int64), on_gpu(4, 80)
    dit.begin_step(now, table, on_gpu(80))
    dit.begin_step(now, table, on_gpu(80))
    dit._attend[(2, 2, 2)](
        on_gpu(128, 384), on_gpu(128, 128), on_gpu(2, 4, dtype=torch.int32), on_gpu(2, 4, dtype=torch.int64), now, 1, 64, 0.125,
        KEPT=2, TAILS=2, HEADS=2, D=64, TILE=64, KEYS=64, num_warps=4, num_stages=3, PDL=True, launch_pdl=True)
    w = int8_rows(torch.zeros(64, 128, dtype=torch.int8), torch.zeros(64), None)
    given = tuple(t.as_subclass(OnGpu) for t in pointers(w))
    _output[(8,)](on_gpu(2, 8, 64), on_gpu(2, 8, 2), on_gpu(1, dtype=torch.int32), given, on_gpu(1, 64),
                  W=matrix(w, Tile(8, 4)), H=Heads(2, 1, 64, 8, 128), PDL=False, num_warps=4)
    from cosyq.kernels import vocoder
    from cosyq.kernels.streaming import Extent
    layer = vocoder.Conv(on_gpu(3, 16, 16), on_gpu(1, 16), (3,))
    vocoder.conv(on_gpu(70, 16), layer, on_gpu(4, dtype=torch.int32), rows=Extent(1, 1), raw=on_gpu(1, 1, 16))
    return len(attempts[-1])

if sys.argv[1] == "fail":
    dit._attend._name = "attention"  # which there is none of
assert (launch.at_once(work) if sys.argv[1] in ("together", "fail") else work()) == 5
print(attempts[-1])
print([len(launched) for launched in attempts])
print(sorted(by))
print("triton" in sys.modules and sys.modules["triton"] is not None)
"""


def run(mode, folder):
    environment = os.environ | {"XDG_CACHE_HOME": str(folder), "TRITON_INTERPRET": "0"}
    environment["TRITON_CACHE_DIR"] = str(folder / "triton")
    return subprocess.run([sys.executable, "-c", SCRIPT, mode], env=environment, capture_output=True, text=True)


def said(done):
    assert done.returncode == 0, done.stderr
    launched, counts, by, imported = done.stdout.splitlines()
    return eval(launched), eval(counts), eval(by), imported == "True"


def test_what_one_process_compiles_another_launches_without_triton(tmp_path):
    done = run("compile", tmp_path)
    compiled, counts, by, imported = said(done)
    assert (counts, by, imported) == ([5], ["MainThread"], True)
    kept = [*tmp_path.rglob("*.kernel")]
    assert len(kept) == 4
    assert done.stderr == f"compiling kernels for this GPU, which are kept in {kept[0].parent}\n"
    done = run("find", tmp_path)
    found, counts, by, imported = said(done)
    assert (counts, by, imported, done.stderr) == ([5], [], False, "")
    assert found == compiled
    step, again, attend, output, conv = found
    # of the whole numbers, 80 was compiled as a multiple of 16 and handed over; a 1 would be compiled in
    assert step == again == ("begin_step_kernel", (1,), 4, 0, False, ["Q", "Q", "Q", "i80"])
    name, grid, warps, shared, overlaps, passed = attend
    assert (name, grid, warps, overlaps) == ("attend_kernel", (2, 2, 2), 4, True)
    assert shared > 16384
    assert passed == ["Q"] * 5 + ["i1", "i64", "f0.125"], "the layer is an argument even where it is 1"
    assert (output[0], output[-1]) == ("output_kernel", ["Q"] * 10), "tuples are laid open"
    assert (conv[0], conv[-1]) == ("conv_kernel", ["Q"] * 5 + ["i1", "i1", "i0", "i0", "i0", "i0"]), "nothing is not"


def test_what_is_recorded_at_once_is_compiled_side_by_side(tmp_path):
    launched, counts, by, _ = said(run("together", tmp_path))
    assert (counts, by) == ([0, 0, 5], ["compiling"])
    assert len([*tmp_path.rglob("*.kernel")]) == 4
    names = ["begin_step_kernel", "begin_step_kernel", "attend_kernel", "output_kernel", "conv_kernel"]
    assert [name for name, *_ in launched] == names, "each once"
    next(path for path in tmp_path.rglob("*.kernel") if b"conv_kernel" in path.read_bytes()).unlink()
    assert said(run("together", tmp_path)) == (launched, [4, 0, 5], ["compiling"], True), "broken off, ordered, done"


def test_what_cannot_be_compiled_is_an_error(tmp_path):
    done = run("fail", tmp_path)
    assert done.returncode == 1
    assert "attention_kernel" in done.stderr.splitlines()[-1]


def test_arguments_are_told_apart_as_triton_compiles_them():
    tensor = torch.zeros(64)
    kinds = [
        _kind(x)
        for x in (
            tensor, tensor[1:], tensor.double(), 1, 2, 16, 2**31, 2**31 + 1, 0.0, None, (2, 2), ((2,), 2), (2, (2,)),
        )
    ]  # fmt: skip
    assert len(set(map(repr, kinds))) == len(kinds)
    assert _kind(tensor) == _kind(tensor[4:]) == _kind(torch.ones(3))
    assert (_kind(2), _kind(0), _kind(0.5)) == (_kind(-3), _kind(32), _kind(1.0))
    assert {_kind(x) for x in (True, object(), "text")} == {UNKNOWN}


def test_a_cpu_has_triton_interpret(monkeypatch):
    row = torch.zeros(5)
    kernel = Kernel("dit", "begin_step")
    kernel[(1,)](torch.tensor([1, 0, 0]), torch.arange(10.0).view(2, 5), row, 5, SIZE=8, num_warps=4)
    assert row.tolist() == [5, 6, 7, 8, 9]
    assert kernel._found == {}


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000])
def test_sizes(n):
    assert next_power_of_2(n) >= n > next_power_of_2(n) // 2
    assert cdiv(n, 16) * 16 >= n > (cdiv(n, 16) - 1) * 16
