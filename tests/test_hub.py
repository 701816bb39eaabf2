"""Fetching from a Hub: the real client against a small server with the Hub's answers."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest
from conftest import GOLDEN

COMMIT = "29e01c4e8d000f4bcd70751be16fa94bf3d85a18"
REPO = "someone/tiny"


@pytest.fixture
def hub():
    """Serves the golden checkpoint, and a large file that no build needs; remembers what was asked for."""
    files = {str(p.relative_to(GOLDEN)): p.read_bytes() for p in GOLDEN.rglob("*") if p.is_file()}
    files["speech_tokenizer_v3.onnx"] = b"large"
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            headers.setdefault("Content-Length", str(len(body)))
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = unquote(self.path.partition("?")[0])
            if path.startswith(f"/api/models/{REPO}"):
                entries = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()]
                info = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
                body = json.dumps(entries if "/tree/" in path else info).encode()
                return self.answer(200, body, Content_Type="application/json")
            name = path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
            if name not in files:
                return self.answer(404, X_Error_Code="RepoNotFound")
            if self.command == "GET":
                asked.append(name)
            etag = hashlib.sha256(files[name]).hexdigest()
            self.answer(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.asked, server.files = asked, files
    yield server
    server.shutdown()
    server.server_close()


def quantize(hub, tmp_path, output, source=f"{REPO}@{COMMIT}", **more):
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
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


def test_what_the_hub_lacks(hub, tmp_path):
    del hub.files["flow.pt"]
    done = quantize(hub, tmp_path, tmp_path / "a")
    assert done.returncode == 5
    assert "the repository lacks flow.pt" in done.stderr
    done = quantize(hub, tmp_path, tmp_path / "a", source=f"nobody/nothing@{COMMIT}")
    assert done.returncode == 5
    assert "the Hub answered 404" in done.stderr
    assert [line.partition(":")[0] for line in done.stderr.strip().splitlines()] == ["source", "error"]
