"""Fetching from a Hub: the real client against a small server with the Hub's answers."""

import hashlib
import json
import os
import time

import pytest
from conftest import GOLDEN, refused
from huggingface_hub import constants
from stand_in_hub import Repository

from cosyq.errors import NetworkError
from cosyq.hub.web import fetch_file

COMMIT = "29e01c4e8d000f4bcd70751be16fa94bf3d85a18"
REPO = "someone/tiny"


@pytest.fixture
def hub(hub, encoders_folder, monkeypatch):
    """Serves the golden checkpoint with encoders, and a file that no build needs; remembers what was asked for."""
    files = {str(p.relative_to(GOLDEN)): p.read_bytes() for p in GOLDEN.rglob("*") if p.is_file()}
    files |= {p.name: p.read_bytes() for p in encoders_folder.iterdir()} | {"flow.decoder.onnx": b"large"}
    hub.repositories[REPO] = Repository()
    hub.repositories[REPO].commit("main", files, sha=COMMIT)
    monkeypatch.delenv("HF_TOKEN")
    return hub


@pytest.fixture
def quantize(cli):
    def call(output, source=f"{REPO}@{COMMIT}", voices="[]"):
        return cli("quantize", "int8", "--source", source, "-o", output, "--device", "cpu", "--set", f"voices={voices}")

    return call


def test_only_what_a_build_needs_is_fetched_and_kept(hub, quantize, offline, tmp_path):
    code, _, err = quantize(tmp_path / "a")
    assert code == 0, err
    assert sorted(hub.asked) == [
        "CosyVoice-BlankEN/config.json",
        "CosyVoice-BlankEN/merges.txt",
        "CosyVoice-BlankEN/tokenizer_config.json",
        "CosyVoice-BlankEN/vocab.json",
        "cosyvoice3.yaml",
        "flow.pt",
        "hift.pt",
        "llm.pt",
    ]
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["source"]["repo"] == REPO
    assert manifest["source"]["revision"] == COMMIT
    hub.asked.clear()
    offline()
    code, _, err = quantize(tmp_path / "b")  # cached, and no Hub
    assert code == 0, err
    assert hub.asked == []


def test_the_encoders_are_fetched_where_a_voice_needs_them(hub, quantize, tmp_path):
    """And only then, as the test before shows. What else there is was fetched before."""
    assert quantize(tmp_path / "a")[0] == 0
    hub.asked.clear()
    audio = GOLDEN.parent / "audio" / "zero_shot_prompt.wav"
    code, _, err = quantize(tmp_path / "b", voices=f"[{{name: me, audio: {audio}, transcript: ''}}]")
    assert code == 0, err
    assert sorted(hub.asked) == ["campplus.onnx", "speech_tokenizer_v3.onnx"]
    assert (tmp_path / "b" / "voices" / "me.safetensors").is_file()


def test_what_the_hub_lacks(hub, quantize, tmp_path):
    del hub.repositories[REPO].head()["flow.pt"]
    refused(quantize(tmp_path / "a"), 5, "the repository lacks flow.pt")
    result = quantize(tmp_path / "a", source=f"nobody/nothing@{COMMIT}")
    # What it says of names it will not tell strangers of.
    refused(result, 5, "the Hub answered 401", "check the name")
    assert [line.partition(":")[0] for line in result[2].strip().splitlines()] == ["source", "error"]


# ---- single files from the web


CONTENT = b"a recording"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def fetch():
    """Fetch a file: (path or None, what was said against it)."""

    def call(url):
        try:
            return fetch_file(url, SHA256), ""
        except NetworkError as error:
            return None, str(error)

    return call


def kept(tmp_path):
    return [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_file_is_asked_for_once(web, fetch, tmp_path, monkeypatch):
    web.pages["/a.wav"] = CONTENT
    path, _ = fetch(f"{web.address}/a.wav")
    assert path.read_bytes() == CONTENT
    assert kept(tmp_path) == [path]
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert fetch(f"{web.address}/a.wav")[0] == path
        assert fetch("https://localhost:1/moved.wav")[0] == path  # its content names it, not its address
        assert web.asked == ["/a.wav"]
        path.write_bytes(b"damaged")
        _, error = fetch(f"{web.address}/a.wav")
        assert "not in the cache, and HF_HUB_OFFLINE is set" in error
    assert fetch(f"{web.address}/a.wav")[0].read_bytes() == CONTENT
    assert web.asked == ["/a.wav"] * 2


def answer(status=200, content=CONTENT, pause=0.0, **headers):
    """A page that says what it is told to, in pieces with a pause between them."""

    def page(handler):
        handler.send_response(status)
        for key, value in headers.items():
            handler.send_header(key.replace("_", "-"), value)
        handler.end_headers()
        for start in range(0, len(content), 1 << 20 if not pause else 1):
            handler.wfile.write(content[start : start + (1 << 20 if not pause else 1)])
            time.sleep(pause)

    return page


BIG = bytes(33 << 20)
REFUSED = {
    "missing": (answer(404), "the server answered 404"),
    "another": (answer(content=b"something else"), f"sha256 is {hashlib.sha256(b'something else').hexdigest()}"),
    "claims much": (answer(Content_Length=str(10 << 30)), "more than 32 MB"),
    "sends much": (answer(content=BIG), "more than 32 MB"),
    "breaks off": (answer(Content_Length=str(len(CONTENT) + 7)), "ended 7 bytes too early"),
    "nonsense": (answer(content=b"zzz", Transfer_Encoding="chunked"), "cannot be fetched"),
    "drips": (answer(pause=0.3), "not there after 1 s"),
    "to http": (answer(302, b"", Location="http://localhost:1/a.wav"), "redirects to 'http://localhost:1/a.wav'"),
    "to a file": (answer(302, b"", Location="file:///etc/passwd"), "the server answered 302"),
    "in circles": (answer(302, b"", Location="/bad.wav"), "the server answered 302"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_server_may_not_do(web, fetch, tmp_path, monkeypatch, case):
    page, message = REFUSED[case]
    web.pages["/bad.wav"] = page
    if case == "drips":
        monkeypatch.setattr("cosyq.hub.web.SECONDS_IN_ALL", 1)
    _, error = fetch(f"{web.address}/bad.wav")
    assert error.startswith(f"{web.address}/bad.wav: ")
    assert message in error
    assert kept(tmp_path) == []


def test_a_redirect_within_https(web, fetch):
    web.pages |= {"/a.wav": CONTENT, "/old.wav": answer(301, b"", Location=f"{web.address}/a.wav")}
    assert fetch(f"{web.address}/old.wav")[0].read_bytes() == CONTENT


def test_servers_that_are_not_there_or_not_who_they_say(web, fetch, tmp_path, monkeypatch):
    web.pages["/a.wav"] = CONTENT
    monkeypatch.setenv("SSL_CERT_FILE", os.devnull)
    assert "CERTIFICATE_VERIFY_FAILED" in fetch(f"{web.address}/a.wav")[1]
    assert "cannot be fetched ([Errno" in fetch("https://localhost:1/a.wav")[1]
    assert "cannot be fetched (encoding with 'idna'" in fetch("https://no..host/a.wav")[1]
    assert web.asked == []
    assert kept(tmp_path) == []


def test_a_cache_that_cannot_be_written(web, fetch, tmp_path):
    web.pages["/a.wav"] = CONTENT
    (tmp_path / "cache").write_text("in the way")
    assert "cannot be kept" in fetch(f"{web.address}/a.wav")[1]
