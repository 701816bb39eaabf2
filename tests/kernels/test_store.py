"""Compiled kernels on disk."""

import dataclasses
import json
import os

import pytest

from cosyq.kernels import store
from cosyq.kernels.store import Binary

BINARY = Binary("attend_kernel", 49152, 4, True, ("Q", "", "i", "q", "f"), b"\x7fELF\n\x00 {code}\n")
KEY = ("dit", "attend", (9, 0), ((("float32", True), "float"), ()), (("D", 64),))


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store.folder.cache_clear()
    yield tmp_path
    store.folder.cache_clear()


def test_what_is_kept_is_found_under_its_own_key(folder):
    assert store.find(KEY) is None
    store.keep(KEY, BINARY)
    assert store.find(KEY) == BINARY
    assert store.find((*KEY[:-1], (("D", 128),))) is None
    (file,) = folder.rglob("*.kernel")
    assert os.stat(file.parent).st_mode & 0o077 == 0
    assert [*folder.rglob(".*")] == [], "nothing else is left"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: b"",
        lambda data: b"not JSON\n" + data.partition(b"\n")[2],
        lambda data: data.replace(b'"warps"', b'"worps"'),
        lambda data: data.replace(b'"Q"', b'"s"'),
        lambda data: json.dumps([]).encode() + b"\n",
        lambda data: data.replace(b'["Q", "", "i", "q", "f"]', b"null"),
    ],
)
def test_what_is_damaged_is_not_there(folder, damage):
    store.keep(KEY, BINARY)
    (file,) = folder.rglob("*.kernel")
    file.write_bytes(damage(file.read_bytes()))
    assert store.find(KEY) is None
    store.keep(KEY, BINARY)
    assert store.find(KEY) == BINARY


def test_a_cache_that_cannot_be_written_is_done_without(folder):
    (folder / "cosyq").write_text("in the way")
    store.keep(KEY, BINARY)
    assert store.find(KEY) is None


def test_a_user_without_a_home_keeps_nothing(folder, monkeypatch):
    def homeless(kind):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(store, "cache_folder", homeless)
    store.keep(KEY, BINARY)
    assert store.find(KEY) is None
    assert store.folder() is None
    assert [*folder.rglob("*.kernel")] == []


def test_another_compiler_has_another_folder(folder, monkeypatch):
    first = store.folder()
    seen = {first}
    for name, value in (("TRITON_DISABLE_LINE_INFO", "1"), ("TRITON_DISABLE_LINE_INFO", "0")):
        monkeypatch.setenv(name, value)
        store.folder.cache_clear()
        seen.add(store.folder())
    monkeypatch.setattr(store.importlib.metadata, "version", lambda name: "0.0")
    store.folder.cache_clear()
    seen.add(store.folder())
    assert len(seen) == 4
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    store.folder.cache_clear()
    assert store.folder() == first


def test_all_fields_are_kept(folder):
    for field, other in {"name": "x", "shared": 0, "warps": 8, "overlaps": False, "takes": (), "code": b""}.items():
        changed = dataclasses.replace(BINARY, **{field: other})
        store.keep(KEY, changed)
        assert store.find(KEY) == changed != BINARY
