"""cosyq bench as a user meets it, on the golden model."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from operator import truediv

import pytest
from conftest import refused
from test_cli import as_on_a_terminal
from waiting import wait_for

from cosyq.artifact.reader import open_artifact
from cosyq.bench import PARTS
from cosyq.bench.streams import Answers, Heard
from cosyq.cli.bench import _parts
from cosyq.publish.card import model_card
from cosyq.publish.push import contents
from cosyq.publish.reports import read_report
from cosyq.runtime.synthesizer import load

QUICK = ("--dtype", "fp32", "--device", "cpu", "--runs", "1", "--seconds", "1")


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary folders are made."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torch"))  # torch's own, where it is imported first
    return folder


def test_everything_is_measured_and_kept(cli, scratch_artifact, scratch, monkeypatch):
    for module in ("parts", "streams", "serve", "cold"):
        monkeypatch.setattr(f"cosyq.bench.{module}.WORDS", "yes")
    monkeypatch.setattr("cosyq.bench.run.ALONE", 1)
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
    assert found["speech"]["whole_audio_seconds"] == 1
    assert found["speech"]["first_audio_seconds"]["median"] < (
        found["speech"]["audio_seconds"] * found["speech"]["streamed_real_time_factor"]["median"]
    )
    assert found["memory_bytes"]["spoken"]["peak"] >= found["memory_bytes"]["loaded"]["used"]
    assert [s["requests"] for s in found["streams"]] == [1, 2]
    assert [s["requests"] for s in found["served"]["streams"]] == [1, 2]
    assert found["served"]["requests"] == 1
    # Of so small a model, in a process whose collector rests, neither of the two is surely the shorter.
    assert min(found["cold"][name]["median"] for name in ("first_audio_seconds", "bare_seconds")) > 0
    cold = found["cold"]
    medians = (cold[name]["median"] for name in ("first_audio_seconds", "bare_seconds"))
    assert cold["ratio"] == pytest.approx(truediv(*medians), abs=3e-3)  # of rounded seconds
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
    for engine in ("fused", "fused8"):
        refused(cli("bench", *here, "--engine", engine, "--device", "cpu"), 4, f"the engine {engine} needs a CUDA GPU")
    refused(cli("bench", *here, "--flow-steps", "7", "--device", "cpu"), 2, "it has: 10")
    several = ("-a", artifact_of("int8", "stages.flow.steps=[10,4]"), "--flow-steps", "4", "--device", "cpu")
    refused(cli("bench", *several, "--parts", "serve"), 2, "a server of this artifact takes 10")
    refused(cli("bench", *here, "-v", "nobody", "--device", "cpu"), 2, "unknown voice")
    refused(cli("bench", *here, "--random", "small"), 2, "not both")
    refused(cli("bench", *here, "--recipe", "int8"), 2, "packed already")
    refused(cli("bench", "--random", "small", "--save"), 2, "--json")
    refused(cli("bench", "--random", "small", "--recipe", "int9"), 2, "int9", "shipped are")
    refused(cli("bench", "-a", "hf://me/tiny", "--save"), 2, "cosyq pull")
    refused(cli("bench", "-a", tmp_path / "none"), 3, "no such artifact", "cosyq quantize")
    assert list(scratch.iterdir()) == []


def test_a_server_has_the_device_to_itself(cli, artifact_of, monkeypatch):
    """The engine that was measured before is gone when the server starts."""
    engines = []

    def loaded(*given, **options):
        tts = load(*given, **options)
        engines.append(weakref.ref(tts.engine))
        return tts

    def over_http(artifact, manner, place, load, rows, device, say):
        (engine,) = engines
        assert engine() is None
        assert (place, rows, load.alone) == ({"engine": "cpu", "device": "cpu", "dtype": "fp32"}, 4, 2)
        return Answers((), (Heard(1.0, 2.0, 3.0, 0.0),) * 2)

    monkeypatch.setattr("cosyq.bench.streams.WORDS", "yes")
    monkeypatch.setattr("cosyq.bench.run.ALONE", 2)
    monkeypatch.setattr("cosyq.bench.run.load", loaded)
    monkeypatch.setattr("cosyq.bench.run.over_http", over_http)
    code, out, err = cli("bench", "-a", artifact_of("int8"), *QUICK, "--parts", "serve", "--streams", "5", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [s["streams"] for s in found["streams"]] == [5]
    assert found["served"]["first_audio_seconds"]["median"] == 1.0


def test_without_the_servers_packages_all_is_the_rest(cli, artifact_of, monkeypatch, capsys):
    assert _parts("all") == frozenset(PARTS)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert _parts("all") == frozenset(PARTS) - {"serve"}
    assert (
        "serve is left out: uvicorn not here; install them with `pip install 'cosyq[serve]'`" in capsys.readouterr().err
    )
    told = "the server's packages are not here (uvicorn)", "pip install 'cosyq[serve]'"
    refused(cli("bench", "-a", artifact_of("int8"), "--parts", "llm,serve"), 2, *told)


def test_a_server_ends_with_an_interrupted_bench(artifact_of, tmp_path):
    """While it is asked for minutes of audio."""
    code = """
from cosyq.bench import run, serve, streams
from cosyq.cli import main
run.ALONE, streams.WORDS, serve.WORDS = 1, "yes", "and so on. " * 300
main()
"""
    command = [sys.executable, "-c", code, "bench", "-a", artifact_of("int8"), *QUICK, "--parts", "serve"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [*command, "--streams", "1"], env=environment, stderr=subprocess.PIPE, preexec_fn=as_on_a_terminal
    )

    def ready():
        """What a server has logged by then."""
        assert process.poll() is None, process.stderr.read()
        lines = [line for log in tmp_path.glob("*/log") for line in log.read_text().splitlines()]
        return lines if any('"ready"' in line for line in lines) else None

    (port,) = [entry["port"] for entry in map(json.loads, wait_for(ready, 60)) if entry["message"] == "listening"]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"error: interrupted\n")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert list(tmp_path.iterdir()) == []


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
