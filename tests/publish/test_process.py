"""Pushing and pulling as a build pipeline does: in processes of their own, over the storage that the client prefers.

All settings come from the environment, no terminal is there, and nothing answers. Large files go by hf_xet.
"""

import json
import os
import subprocess
import sys

import pytest
from stand_in_hub import REPO, TOKEN, Fault

LARGE = ("flow.safetensors", "llm.safetensors", "vocoder.safetensors")


@pytest.fixture
def alone(hub, tmp_path):
    """Run a command line; returns what subprocess says."""
    clean = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET")}
    environment = clean | {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_XET_XORB_COMPRESSION_POLICY": "none",
        "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1",
        "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
    }

    def call(*arguments):
        command = [sys.executable, "-m", "cosyq", *map(str, arguments)]
        return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)

    return call


def test_there_and_back(hub, alone, artifact_of, tmp_path):
    artifact = artifact_of("int8")
    hub.faults = [Fault("POST", "/cas/v1/xorbs/", cut=70_000)]
    broken = alone("push", artifact, REPO, "--json")
    assert broken.returncode == 5
    assert len(hub.repositories[REPO].commits) == 1
    (line,) = broken.stderr.splitlines()
    assert line.startswith(f"error: {REPO}@main: the Hub is out of reach (")
    assert "run it again" in line
    assert TOKEN not in broken.stderr + broken.stdout

    hub.faults = []
    done = alone("push", artifact, REPO, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["commit"] == hub.repositories[REPO].branches["main"]
    head = hub.repositories[REPO].head()
    for name in LARGE:
        assert head[name] == (artifact / name).read_bytes()
    assert hub.xet.xorbs
    assert not [request for request in hub.requests if request.startswith("PUT /large/")]

    hub.requests.clear()
    back = alone("pull", REPO, "-o", tmp_path / "back")
    assert back.returncode == 0, back.stderr
    for name in LARGE:
        assert head[name] == (tmp_path / "back" / name).read_bytes()
    assert not {f"GET /{REPO}/resolve/{hub.repositories[REPO].branches['main']}/{name}" for name in LARGE} & {
        *hub.requests
    }
    assert [request for request in hub.requests if request.startswith("GET /xorbs/")]
