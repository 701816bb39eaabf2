"""The promise of an evaluation at full size: run with `make test-slow`, alone."""

import json
import os
import subprocess
import sys

import pytest
from conftest import make_artifact

from cosyq.random_model import FULL, write_random

pytestmark = pytest.mark.slow
LIMIT = 8e9  # bytes of host memory


def test_an_evaluation_at_full_size_streams(tmp_path):
    write_random(tmp_path / "checkpoint", FULL, 0)
    artifact = make_artifact(tmp_path / "artifact", "int8", source=tmp_path / "checkpoint")
    (tmp_path / "texts.txt").write_text("Hi.\nYes.\n")
    command = [sys.executable, "-m", "cosyq", "eval", artifact, "--against", tmp_path / "checkpoint", "--device", "cpu"]
    done = subprocess.run(
        [*map(str, command), "--texts", str(tmp_path / "texts.txt"), "--json"],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(report["peak_memory_bytes"])
    assert report["peak_memory_bytes"] < LIMIT
    assert report["findings"]["llm.kl"]["artifact"]["low"] > 0
