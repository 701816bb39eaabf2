"""Weights that are on the GPU before torch is there."""

import ctypes
import gc
import json
import shutil
import threading
from dataclasses import replace

import pytest
import torch

from cosyq.artifact import ahead, reader
from cosyq.artifact.names import HOST_TENSOR, STAGE_FILES
from cosyq.artifact.reader import open_artifact
from cosyq.cli.starting import starting


class Driver:
    """libcuda, as far as it is called, with the host's memory."""

    def __init__(self, broken="", free=1 << 40):
        self.broken, self.free, self.there, self.copies = broken, free, {}, 0

    def cuCtxSetCurrent(self, context):
        return 201 if self.broken == "context" else 0

    def cuMemGetInfo_v2(self, free, total):
        free._obj.value = self.free
        return 0

    def cuMemAlloc_v2(self, address, size):
        memory = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(memory)
        self.there[ctypes.addressof(memory)] = memory
        return 2 if self.broken == "alloc" else 0

    def cuMemcpyHtoD_v2(self, place, source, size):
        ctypes.memmove(place.value, source, size.value)
        self.copies += 1
        return 700 if self.broken == "copy" else 0

    def cuMemFree_v2(self, address):
        del self.there[address.value]
        return 0


@pytest.fixture(params=["int8"])
def copied(request, artifact_of, tmp_path, monkeypatch):
    """The artifact, to be changed, and a torch that takes the host's memory for the GPU's."""

    def as_tensor(there, device):
        assert device.type == "cuda"
        memory = (ctypes.c_char * there.size).from_address(there.__cuda_array_interface__["data"][0])
        memory.owner = there
        return torch.frombuffer(memory, dtype=torch.uint8)

    shutil.copytree(artifact_of(request.param), tmp_path / "copy")
    monkeypatch.setattr(reader.torch, "as_tensor", as_tensor)
    monkeypatch.setattr(ahead, "PIECE", 1000)
    yield open_artifact(tmp_path / "copy")
    ahead.forget()


def read(artifact, driver, context=1):
    ahead.announce({artifact.folder / name: HOST_TENSOR.get(stage) for stage, name in STAGE_FILES.items()})
    ahead.read(driver, context)
    return driver


def found(artifact, stage="llm", device="cuda"):
    return reader._read_ahead(artifact, stage, torch.device(device))


BOTH = pytest.mark.parametrize("copied", ["int8", "nf4"], indirect=True)


@BOTH
@pytest.mark.parametrize("stage", list(STAGE_FILES))
def test_what_was_read_is_what_the_file_holds(copied, stage):
    driver = read(copied, Driver())
    early, late = found(copied, stage), reader.StageFile(copied, stage)
    names = {reader._tensor_name(m, name) for m in copied.modules(stage) for name in late.read(m)}
    left = {name for name in names if name.startswith("text_embedding.weight") or "quant_state" in name}
    assert early.keys() | left == names
    assert "text_embedding.weight" not in early
    for name, tensor in early.items():
        assert torch.equal(tensor, late._tensor(name)), name
        assert tensor.dtype == late._tensor(name).dtype
    assert len(driver.there) == 3
    assert found(copied, stage) == {}, "once"


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_network_keeps_nothing_of_what_was_read(copied, dtype, monkeypatch):
    def load():
        place = {"device": torch.device("cpu"), "dtype": dtype, "matmul": "dequantize"}
        return [reader.load_stage(copied, stage, **place) for stage in STAGE_FILES]

    def tensors(networks):
        layers = [m for network in networks for m in network.modules()]
        packed = [t for m in layers if hasattr(m, "packed") for t in m.packed.values()]
        biases = [m.bias for m in layers if hasattr(m, "packed") and getattr(m, "bias", None) is not None]
        return [*packed, *biases, *(p for network in networks for p in network.parameters())]

    expected = tensors(load())
    driver, kept, early = read(copied, Driver()), [], reader._read_ahead

    def on_gpu(artifact, stage, device):
        kept.append(early(artifact, stage, torch.device("cuda")))
        return kept[-1]

    monkeypatch.setattr(reader, "_read_ahead", on_gpu)
    networks = load()
    for tensor in (t for part in kept for t in part.values()):
        tensor.zero_()
    assert all(torch.equal(a, b) for a, b in zip(tensors(networks), expected, strict=True))
    del tensor
    kept.clear()
    gc.collect()
    assert driver.there == {}, "it is free once it was copied"


def test_a_file_that_changed_is_read_again(copied):
    path = copied.folder / STAGE_FILES["llm"]
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"cosyq_stage", b"cosyq_stagf", 1))
    read(copied, Driver())
    path.write_bytes(whole)
    assert found(copied) == {}, "it had another header"
    path.write_bytes(whole + b"\0")
    read(copied, Driver())
    path.write_bytes(whole)
    assert found(copied) == {}, "it was longer"
    read(copied, Driver())
    assert found(copied)


@pytest.mark.parametrize("offsets", [[0, 3], [-4, 0], [4, 0], [1, 5], ["0", "4"], None, [0]])
def test_a_header_that_lies_is_none(copied, offsets):
    """One that hashes to what the manifest says, and passed for another reader's."""
    data = bytes(16)
    text = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode().ljust(96)
    header = len(text).to_bytes(8, "little") + text
    (copied.folder / STAGE_FILES["vocoder"]).write_bytes(header + data)
    record = replace(copied.manifest.files[STAGE_FILES["vocoder"]], bytes=len(header + data))
    digest = reader.hashlib.sha256(header).hexdigest()
    copied.manifest.files[STAGE_FILES["vocoder"]] = replace(record, header_sha256=digest)
    read(copied, Driver())
    assert found(copied, "vocoder") == {}


@pytest.mark.parametrize("content", [None, b"", b"1234567", b"\xff" * 100, bytes(8), bytes(100)], ids=range(6))
def test_what_is_no_stage_is_left_to_the_reader(copied, content):
    path = copied.folder / STAGE_FILES["llm"]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    driver = read(copied, Driver())
    assert ahead.taken(path) is None
    if content is not None:
        assert len(driver.there) == 2, "the other stages are there"


@pytest.mark.parametrize("broken", ["context", "alloc", "copy", "full"])
def test_a_gpu_that_has_no_room_is_left_alone(copied, broken):
    driver = Driver(broken)
    if broken == "full":
        driver.free = 2 * sum((copied.folder / name).stat().st_size for name in STAGE_FILES.values())
    read(copied, driver)
    assert [ahead.taken(copied.folder / name) for name in STAGE_FILES.values()] == [None] * 3
    gc.collect()
    assert driver.broken == "alloc" or driver.there == {}


def test_a_driver_of_another_kind_is_not_waited_for(copied):
    driver = Driver()
    driver.cuMemGetInfo_v2 = None
    with pytest.raises(TypeError):
        read(copied, driver)
    assert all(reading.done.is_set() for reading in ahead._begun.values())
    assert found(copied) == {}


def test_no_gpu_is_waited_for(copied):
    read(copied, None, context=None)
    assert found(copied) == {}
    read(copied, Driver())
    assert found(copied, device="cpu") == {}, "torch took the processor"


def test_one_that_is_being_read_is_waited_for(copied):
    driver, go = Driver(), threading.Event()
    driver.cuCtxSetCurrent = lambda context: 0 if go.wait(10) else 1
    ahead.announce({copied.folder / STAGE_FILES["flow"]: None})
    thread = threading.Thread(target=ahead.read, args=(driver, 1))
    thread.start()
    threading.Timer(0.05, go.set).start()
    assert found(copied, "flow")
    thread.join(10)


def test_what_was_not_taken_is_freed(copied):
    driver = read(copied, Driver())
    assert len(driver.there) == 3
    ahead.forget()
    assert driver.there == {}
    driver.cuCtxSetCurrent = lambda context: ahead.forget() or 0
    before = driver.copies
    read(copied, driver)
    assert (driver.there, driver.copies) == ({}, before), "and no more is read"


def test_nothing_is_announced_that_will_not_be_read(tmp_path):
    with starting(tmp_path, "cpu"):
        assert ahead._begun == {}
    with starting(tmp_path, "cpu"):
        ahead.announce({tmp_path / "x": None})
    assert ahead._begun == {}
