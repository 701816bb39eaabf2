"""cosyq bench as a user meets it, on the golden model."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from conftest import refused
from test_cli import as_on_a_terminal

from cosyq.artifact.reader import open_artifact
from cosyq.publish.card import model_card
from cosyq.publish.push import contents
from cosyq.publish.reports import read_report

QUICK = ("--dtype", "fp32", "--device", "cpu", "--runs", "1", "--seconds", "1")


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary folders are made."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_everything_is_measured_and_kept(cli, scratch_artifact, scratch, monkeypatch):
    for module in ("parts", "streams", "cold"):
        monkeypatch.setattr(f"cosyq.bench.{module}.WORDS", "yes")
    parts = ("--parts", "all", "--streams", "1,2")
    code, out, _ = cli("bench", "-a", scratch_artifact, *QUICK, *parts, "--save", "--json")
    assert code == 0
    found = json.loads(out)
    assert out.count("\n") == 1
    assert (found["engine"], found["dtype"], found["audio_seconds"], found["prompt_seconds"]) == (
        "cpu", "float32", 1, 3.0,
    )  # fmt: skip
    assert found["recipe_sha256"] == open_artifact(scratch_artifact).manifest.recipe_sha256
    assert found["language_model"]["tokens"] == 25
    assert found["flow"]["run_seconds"]["median"] > 0
    assert found["vocoder"]["run_seconds"]["median"] > 0
    assert found["speech"]["first_audio_seconds"]["median"] < (
        found["speech"]["audio_seconds"] * found["speech"]["streamed_real_time_factor"]["median"]
    )
    assert found["memory_bytes"]["spoken"]["peak"] >= found["memory_bytes"]["loaded"]["used"]
    assert [s["requests"] for s in found["streams"]] == [1, 2]
    assert found["cold"]["first_audio_seconds"]["median"] > found["cold"]["bare_seconds"]["median"] > 0
    assert found["cold"]["ratio"] > 1
    assert {"prefill", "token", "flow", "vocoder"} == found["floors"].keys()

    # What lies beside the manifest is the same, and a push takes it along and shows it.
    assert json.loads((scratch_artifact / "bench.json").read_text()) == found
    artifact = open_artifact(scratch_artifact)
    report = read_report(scratch_artifact / "bench.json")
    card = model_card(artifact.manifest, "me/tiny", {"bench.json": report})
    speed = card.partition("## Speed")[2].partition("\n## ")[0]
    assert found["about"] in " ".join(speed.split())
    (first,) = [row for row in found["rows"] if row[0] == "first audio"]
    assert f"| first audio | {first[1]} |" in speed
    assert "bench.json" in contents(artifact, "me/tiny", with_voices=False)
    assert str(scratch_artifact) not in json.dumps(found)
    assert list(scratch.iterdir()) == []


def test_a_table_for_people(cli, artifact_of):
    code, out, err = cli("bench", "-a", artifact_of("int8"), *QUICK, "--parts", "vocoder", "--engine", "reference")
    assert code == 0
    assert err.startswith("fun-cosyvoice3-0.5b-int8, engine reference in float32, on ")
    what = [line.split("\t")[0] for line in out.splitlines()]
    assert what[:2] == ["load", "vocoder, 1 s"]
    assert not (artifact_of("int8") / "bench.json").exists()


def test_random_weights_are_gone_afterwards(cli, scratch):
    arguments = ("--random", "small", "--recipe", "nf4", "--flow-steps", "4", "--parts", "llm,flow")
    code, out, _ = cli("bench", *arguments, *QUICK, "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["artifact"], found["flow_steps"], found["prompt_seconds"]) == ("random-small-nf4", 4, 3.0)
    assert "speech" not in found
    assert list(scratch.iterdir()) == []


def test_what_is_refused(cli, artifact_of, tmp_path, scratch):
    here = ("-a", artifact_of("int8"))
    refused(cli("bench", *here, "--parts", "llm,mel"), 2, "mel: no such part", "llm, flow, vocoder, speech")
    for nonsense in ("", "0", "1,,4", "1,x", "-1", "257", "9" * 5000):
        refused(cli("bench", *here, "--streams", nonsense), 2, "expected numbers from 1 to 256")
    assert cli("bench", *here, "--engine", "warp")[0] == 2
    assert cli("bench", *here, "--seconds", "0")[0] == 2
    refused(cli("bench", *here, "--engine", "fused", "--device", "cpu"), 4, "needs a CUDA GPU")
    refused(cli("bench", *here, "--flow-steps", "7", "--device", "cpu"), 2, "it has: 10")
    refused(cli("bench", *here, "-v", "nobody", "--device", "cpu"), 2, "unknown voice")
    refused(cli("bench", *here, "--random", "small"), 2, "not both")
    refused(cli("bench", *here, "--recipe", "int8"), 2, "packed already")
    refused(cli("bench", "--random", "small", "--save"), 2, "--json")
    refused(cli("bench", "--random", "small", "--recipe", "int9"), 2, "int9", "shipped are")
    refused(cli("bench", "-a", "hf://me/tiny", "--save"), 2, "cosyq pull")
    refused(cli("bench", "-a", tmp_path / "none"), 3, "no such artifact", "cosyq quantize")
    assert list(scratch.iterdir()) == []


def test_an_interrupted_bench_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "cosyq", "bench", "--random", "small", "--parts", "llm", "--runs", "1000"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, preexec_fn=as_on_a_terminal)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("cosyq-bench-*/*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list(tmp_path.iterdir())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []
