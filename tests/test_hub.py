"""Fetching from a Hub: the real client against a small server with the Hub's answers."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stand_in_hub
from conftest import GOLDEN

COMMIT = "29e01c4e8d000f4bcd70751be16fa94bf3d85a18"
REPO = "someone/tiny"


@pytest.fixture
def hub(encoders_folder):
    """Serves the golden checkpoint with encoders, and a file that no build needs; remembers what was asked for."""
    files = {str(p.relative_to(GOLDEN)): p.read_bytes() for p in GOLDEN.rglob("*") if p.is_file()}
    files |= {p.name: p.read_bytes() for p in encoders_folder.iterdir()} | {"flow.decoder.onnx": b"large"}
    with stand_in_hub.hub() as server:
        server.repositories[REPO] = stand_in_hub.Repository()
        server.repositories[REPO].commit("main", files, sha=COMMIT)
        yield server


def quantize(hub, tmp_path, output, source=f"{REPO}@{COMMIT}", voices="[]", **more):
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        **more,
    }
    command = [
        sys.executable,
        "-m",
        "cosyq",
        "quantize",
        "int8",
        "--source",
        source,
        "-o",
        str(output),
        "--device",
        "cpu",
        "--set",
        f"voices={voices}",
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_only_what_a_build_needs_is_fetched_and_kept(hub, tmp_path):
    done = quantize(hub, tmp_path, tmp_path / "a")
    assert done.returncode == 0, done.stderr
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
    again = quantize(hub, tmp_path, tmp_path / "b", HF_HUB_OFFLINE="1")  # cached, and no Hub
    assert again.returncode == 0, again.stderr
    assert hub.asked == []


def test_the_encoders_are_fetched_where_a_voice_needs_them(hub, tmp_path):
    """And only then, as the test before shows. What else there is was fetched before."""
    assert quantize(hub, tmp_path, tmp_path / "a").returncode == 0
    hub.asked.clear()
    audio = GOLDEN.parent / "audio" / "zero_shot_prompt.wav"
    done = quantize(hub, tmp_path, tmp_path / "b", voices=f"[{{name: me, audio: {audio}, transcript: ''}}]")
    assert done.returncode == 0, done.stderr
    assert sorted(hub.asked) == ["campplus.onnx", "speech_tokenizer_v3.onnx"]
    assert (tmp_path / "b" / "voices" / "me.safetensors").is_file()


def test_what_the_hub_lacks(hub, tmp_path):
    del hub.repositories[REPO].head()["flow.pt"]
    done = quantize(hub, tmp_path, tmp_path / "a")
    assert done.returncode == 5
    assert "the repository lacks flow.pt" in done.stderr
    done = quantize(hub, tmp_path, tmp_path / "a", source=f"nobody/nothing@{COMMIT}")
    assert done.returncode == 5
    assert "the Hub answered 401; check the name" in done.stderr  # what it says of names it will not tell strangers of
    assert [line.partition(":")[0] for line in done.stderr.strip().splitlines()] == ["source", "error"]


# ---- single files from the web


CONTENT = b"a recording"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def fetch(tmp_path):
    """Fetch a file in a process of its own, as its environment says: (path or None, what was said against it)."""

    def call(url, *, sha256=SHA256, prelude="pass", **environment):
        code = f"from cosyq.hub import web; {prelude}; print(web.fetch_file({url!r}, {sha256!r}))"
        trusted = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache"), "SSL_CERT_FILE": str(tmp_path / "ca.pem")}
        environment = os.environ | trusted | {"NO_PROXY": "localhost"} | environment
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
        if done.returncode == 0:
            return Path(done.stdout.strip()), ""
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("cosyq.errors.NetworkError: "), done.stderr
        assert url in last
        return None, last

    return call


def kept(tmp_path):
    return [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_file_is_asked_for_once(web, fetch, tmp_path):
    web.pages["/a.wav"] = CONTENT
    path, _ = fetch(f"{web.address}/a.wav")
    assert path.read_bytes() == CONTENT
    assert kept(tmp_path) == [path]
    assert fetch(f"{web.address}/a.wav", HF_HUB_OFFLINE="1")[0] == path
    assert fetch("https://localhost:1/moved.wav")[0] == path  # its content names it, not its address
    assert web.asked == ["/a.wav"]
    path.write_bytes(b"damaged")
    _, error = fetch(f"{web.address}/a.wav", HF_HUB_OFFLINE="1")
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
def test_what_a_server_may_not_do(web, fetch, tmp_path, case):
    page, message = REFUSED[case]
    web.pages["/bad.wav"] = page
    _, error = fetch(f"{web.address}/bad.wav", prelude="web.SECONDS_IN_ALL = 1" if case == "drips" else "pass")
    assert message in error
    assert kept(tmp_path) == []


def test_a_redirect_within_https(web, fetch):
    web.pages |= {"/a.wav": CONTENT, "/old.wav": answer(301, b"", Location=f"{web.address}/a.wav")}
    assert fetch(f"{web.address}/old.wav")[0].read_bytes() == CONTENT


def test_servers_that_are_not_there_or_not_who_they_say(web, fetch, tmp_path):
    web.pages["/a.wav"] = CONTENT
    assert "CERTIFICATE_VERIFY_FAILED" in fetch(f"{web.address}/a.wav", SSL_CERT_FILE=os.devnull)[1]
    assert "cannot be fetched ([Errno" in fetch("https://localhost:1/a.wav")[1]
    assert "cannot be fetched (encoding with 'idna'" in fetch("https://no..host/a.wav")[1]
    assert web.asked == []
    assert kept(tmp_path) == []


def test_a_cache_that_cannot_be_written(web, fetch, tmp_path):
    web.pages["/a.wav"] = CONTENT
    (tmp_path / "cache").write_text("in the way")
    assert "cannot be kept" in fetch(f"{web.address}/a.wav")[1]
