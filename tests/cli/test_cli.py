"""The command line as a user meets it: output, exit codes, one-line errors, nothing half-written."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import wave

import numpy as np
import pytest
import soundfile
import torch
from conftest import GOLDEN, REPOSITORY, refused

from cosyq.artifact.reader import open_artifact
from cosyq.voices.voice import Voice

COSYQ = [sys.executable, "-m", "cosyq"]
MUTE = ("--set", "voices=[]")  # the shipped recipes' voice is on the web, and the golden checkpoint has no encoders


# ---- light entry points


def test_help_is_quick_and_loads_no_torch():
    code = (
        "import sys; from cosyq.cli.main import run; run(['--help']); run(['synth', '--help']);"
        "heavy = [m for m in ('torch', 'numpy', 'bitsandbytes', 'safetensors', 'yaml') if m in sys.modules];"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    best = min(_seconds([*COSYQ, "--help"]) for _ in range(3))
    assert best < 0.5


def _seconds(command):
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def test_importing_the_package_loads_no_torch():
    code = "import sys, cosyq; cosyq.__version__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version_and_usage(cli):
    assert cli("--version")[1].startswith("cosyq 0.")
    assert cli("synth")[0] == 2
    assert cli("nonsense")[0] == 2
    assert cli("synth", "x", "--engine", "warp")[0] == 2


# ---- recipes and quantize


def test_recipes(cli):
    code, out, _ = cli("recipes", "list", "--json")
    assert code == 0
    assert set(json.loads(out)["recipes"]) == {"int8", "nf4", "hybrid", "bf16", "fp32", "mini", "mini-nf4"}
    assert cli("recipes", "show", "nf4")[1] == (REPOSITORY / "recipes" / "nf4.yaml").read_text()


def test_quantize_and_speak(cli, tmp_path):
    artifact, wav = tmp_path / "artifact", tmp_path / "out.wav"
    code, out, _ = cli("quantize", "int8", *MUTE, "--source", GOLDEN, "-o", artifact, "--device", "cpu")
    assert (code, out) == (0, f"{artifact}\n")
    code, out, err = cli("synth", "hello world", "-a", artifact, "-o", wav, "--seed", "3", "--device", "cpu")
    assert (code, out) == (0, f"{wav}\n")
    assert "real-time factor" in err
    with wave.open(str(wav)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24000, 1, 2)
        assert file.getnframes() % 960 == 0
        assert file.getnframes() > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artifact", "out.wav"]


def test_quantize_json_and_dry_run(cli, tmp_path):
    code, out, _ = cli("quantize", "nf4", *MUTE, "--source", GOLDEN, "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0
    entry = next(m for m in plan["modules"] if m["module"] == "llm.head")
    assert entry == {
        "module": "llm.head",
        "rule": "rules[0] llm.head",
        "format": "int8",
        "bytes": 6761 * 64 + 6761 * 4 + 1,
    }
    assert plan["bytes"] == sum(m["bytes"] for m in plan["modules"])
    local = ("--source", GOLDEN, "-o", tmp_path / "a", "--device", "cpu")
    code, out, _ = cli("quantize", "nf4", *MUTE, *local, "--json")
    report = json.loads(out)
    assert report["bytes"] == sum(
        p.stat().st_size for p in (tmp_path / "a").rglob("*") if p.is_file() and p.name != "manifest.json"
    )
    assert plan["bytes"] < report["bytes"]


def test_quantize_refuses(cli, tmp_path, scratch_checkpoint):
    local = ("--source", scratch_checkpoint, "--device", "cpu", "-o", tmp_path / "a", *MUTE)
    refused(cli("quantize", "int9", *local), 2, "int9", "shipped are")
    refused(cli("quantize", "int8", *local, "--set", "stages.llm.weight=x"), 2, "stages.llm.weight: unknown key")
    refused(cli("quantize", "int8", *local, "--set", "stages.llm.weights=7"), 2, "found 7")
    refused(cli("quantize", "int8", *local, "--set", "rules=[{match: nope, weights: bf16}]"), 2, "matches no module")
    refused(cli("quantize", "int8", "--source", "some/where", "-o", tmp_path / "a"), 2, "without a revision")
    refused(cli("quantize", "int8", *MUTE, "--source", tmp_path / "none", "-o", tmp_path / "a"), 3, "no such folder")
    if not shutil.which("nvidia-smi"):
        refused(cli("quantize", "int8", "--source", scratch_checkpoint, "--device", "cuda"), 4, "CUDA is not available")
    (scratch_checkpoint / "flow.pt").write_bytes(b"PK\x03\x04")
    message = refused(cli("quantize", "int8", *local, "--json"), 3, "flow.pt")
    assert not (tmp_path / "a").exists()
    assert message.count("\n") == 0


def test_an_error_with_json_is_json_too(cli):
    code, out, _ = cli("inspect", "nowhere", "--json")
    assert code == 3
    assert json.loads(out)["error"]["exit_code"] == 3


def test_the_hub_out_of_reach(cli, tmp_path):
    line = refused(cli("quantize", "int8", *MUTE, "-o", tmp_path / "a"), 5, "29e01c4e8d000f4bcd70751be16fa94bf3d85a18")
    assert "--source DIR" in line


def test_the_web_out_of_reach(cli, tmp_path, monkeypatch):
    """The shipped recipes' voice: nothing is fetched without it, and nothing is made."""
    monkeypatch.setattr("huggingface_hub.cached_assets_path", lambda *_: tmp_path / "none")
    line = refused(
        cli("quantize", "int8", "-o", tmp_path / "a"), 5, "voice default, https://raw.githubusercontent.com/"
    )
    assert line.endswith("--set voices.N.audio=FILE, or build without voices: --set voices=[]")
    assert list(tmp_path.iterdir()) == []


# ---- voices


def test_a_voice_of_another_model_is_refused(cli, spoken, tmp_path):
    """Its file is sound, but its model has other dimensions: said with the reason, wherever it is used."""
    small = ("--device", "cpu", "-o", tmp_path / "x.wav")
    for field, voice in {
        "speaker": Voice.from_speaker("me", torch.ones(191)),
        "prompt_mel": Voice.from_speaker("me", torch.ones(192), mel_dim=100),
    }.items():
        file = tmp_path / "me.safetensors"
        file.write_bytes(voice.to_bytes())
        reason = (f"me.safetensors: {field} is torch.float32", "expected torch.float32", "made for another model")
        refused(cli("synth", "hello", *spoken, "-v", file, *small), 3, *reason)
        refused(cli("voice", "show", file, *spoken[:2]), 3, *reason)
        change = f"voices=[{{name: me, file: {file}}}]"
        refused(cli("quantize", "int8", "--source", GOLDEN, "--set", change, "-o", tmp_path / "a"), 3, *reason)
        file.unlink()
    assert list(tmp_path.iterdir()) == []


def test_what_voice_add_refuses_before_it_looks_for_encoders(cli, scratch_artifact, tmp_path):
    """The golden artifact does not know where its encoders are, which would be exit 3."""
    audio = GOLDEN.parent / "audio" / "zero_shot_prompt.wav"
    memo = tmp_path / "memo.m4a"
    memo.write_bytes(b"\0\0\0\x1cftypM4A \0\0\2\0M4A isomiso2" + bytes(5000))
    where = ("-a", scratch_artifact)
    for name in ("../me", "a/b", ".me", "a" * 101):
        refused(cli("voice", "add", name, "--audio", audio, *where), 2, "a voice's name is letters")
    refused(cli("voice", "add", "me", "--audio", audio, "--transcript", "a", *where), 2, "no transcript of 3.5 seconds")
    refused(cli("voice", "add", "me", "--audio", memo, *where), 2, "memo.m4a: not readable", "ffmpeg -i FILE out.wav")
    assert open_artifact(scratch_artifact).voice_files() == {}


# ---- synth


@pytest.fixture
def spoken(artifact_of):
    return ("-a", artifact_of("int8"), "--device", "cpu", "--seed", "3")


def test_synth_json(cli, spoken, tmp_path):
    code, out, _ = cli("synth", "hello world", *spoken, "-o", tmp_path / "x.flac", "--json")
    report = json.loads(out)
    assert code == 0
    assert {"load_seconds", "first_audio_seconds", "total_seconds", "real_time_factor", "peak_memory_bytes"} <= set(
        report
    )
    assert report["seed"] == 3
    info = soundfile.info(tmp_path / "x.flac")
    assert info.frames / info.samplerate == pytest.approx(report["audio_seconds"])


def test_synth_normalizes_unless_told_not_to(cli, spoken, tmp_path):
    def report(text, *options):
        return json.loads(cli("synth", text, *spoken, "-o", tmp_path / "x.wav", "--json", *options)[1])

    read, said = report("It is 12."), report("It is twelve.")
    assert read["normalizer"].startswith("wetext 0.")
    assert read["text_tokens"] == said["text_tokens"]
    raw = report("It is 12.", "--no-normalize")
    assert raw["normalizer"] == "none"
    assert raw["text_tokens"] != read["text_tokens"]


def pipe(*arguments, stdin=b""):
    done = subprocess.run([*COSYQ, *map(str, arguments)], input=stdin, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pipes(spoken, tmp_path, cli):
    """stdin to stdout: a wav of open length, raw samples; and as many of them streamed."""
    raw = pipe("synth", "-", *spoken, "-o", "-", "--raw", stdin=b"hello world")
    wav = pipe("synth", "hello world", *spoken)  # no -o: into a pipe
    assert wav[:4] == b"RIFF"
    assert wav[44:] == raw
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="int16")
    assert rate == 24000
    assert np.array_equal(samples, np.frombuffer(raw, "<i2"))
    cli("synth", "hello world", *spoken, "-o", tmp_path / "x.wav")
    assert np.array_equal(soundfile.read(tmp_path / "x.wav", dtype="int16")[0], samples)
    cli("synth", "hello world", *spoken, "-o", tmp_path / "x.s16le", "--raw", "--stream")
    assert (tmp_path / "x.s16le").stat().st_size == len(raw)


def test_synth_refuses(cli, spoken, tmp_path):
    out = ("-o", tmp_path / "x.wav")
    refused(cli("synth", "", *spoken, *out), 2, "nothing to say")
    refused(cli("synth", "\x00\x01\x02", *spoken, *out), 2, "nothing to say")
    refused(cli("synth", "a" * 100_000, *spoken, *out), 2, "100000 characters")
    refused(cli("synth", "hello", *spoken, *out, "-v", "nobody"), 2, "unknown voice", "neutral")
    refused(cli("synth", "hello", *spoken, "-o", tmp_path / "x.aiff"), 2, ".wav, .flac, .ogg, .mp3")
    refused(cli("synth", "hello", *spoken, "-o", tmp_path / "no" / "x.wav"), 2, "no such folder")
    refused(cli("synth", "hello", *spoken, *out, "--flow-steps", "7"), 2, "it has: 10")
    refused(cli("synth", "hello", "-a", tmp_path / "none", *out), 3, "no such artifact", "cosyq quantize")
    assert list(tmp_path.iterdir()) == []


def test_fewer_flow_steps(cli, artifact_of, tmp_path):
    """Of those the artifact has tables for; the first is the default."""
    spoken = ("-a", artifact_of("int8", "stages.flow.steps=[10,4]"), "--device", "cpu", "--seed", "3", "--raw")
    for name, options in {"default": (), "ten": ("--flow-steps", "10"), "four": ("--flow-steps", "4")}.items():
        assert cli("synth", "hello", *spoken, "-o", tmp_path / name, *options)[0] == 0
    default, ten, four = ((tmp_path / name).read_bytes() for name in ("default", "ten", "four"))
    assert default == ten
    assert len(four) == len(ten)
    assert four != ten


def test_no_artifact_and_the_newest(cli, artifact_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(cli("synth", "hello", "-o", "x.wav"), 3, "cosyq quantize int8")
    for index, name in enumerate(("older", "newer")):
        shutil.copytree(artifact_of("int8"), tmp_path / "artifacts" / name)
        os.utime(tmp_path / "artifacts" / name / "manifest.json", (1e9 + index, 1e9 + index))
    code, _, err = cli("synth", "hello", "-o", "x.wav", "--device", "cpu")
    assert code == 0
    assert "using artifacts/newer" in err
    monkeypatch.setenv("COSYQ_ARTIFACT", str(tmp_path / "nothing"))
    refused(cli("synth", "hello", "-o", "x.wav"), 3, "nothing")


def test_audio_does_not_go_to_a_terminal(artifact_of):
    import pty

    master, slave = pty.openpty()
    for arguments in (("synth", "hello"), ("synth", "hello", "-o", "-")):
        done = subprocess.run([*COSYQ, *arguments, "-a", artifact_of("int8")], stdout=slave, stderr=subprocess.PIPE)
        assert done.returncode == 2
        assert b"terminal" in done.stderr or b"no output given" in done.stderr
    os.close(master)
    os.close(slave)


def test_a_reader_that_leaves_is_no_crash(spoken):
    command = [*COSYQ, "synth", "hello world", *map(str, spoken), "--raw", "--stream"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(60) == 141
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


def test_inspect_and_verify(cli, artifact_of, scratch_artifact):
    code, out, err = cli("inspect", artifact_of("nf4"))
    assert code == 0
    assert "llm\tnf4/64+dq\t" in out
    assert "from a local checkpoint" in err
    assert "llm.layers.2.mlp.down_proj\tnf4/32+dq\t64x160\t" in cli("inspect", artifact_of("nf4"), "--tensors")[1]
    assert json.loads(cli("inspect", artifact_of("nf4"), "--json")[1])["schema"] == 1
    code, out, _ = cli("verify", artifact_of("nf4"), "--against", GOLDEN, "--json")
    assert code == 0
    assert 0.05 < json.loads(out)["worst"][0]["rms_error"] < 0.2
    (scratch_artifact / "llm.safetensors").unlink()
    refused(cli("verify", scratch_artifact), 3, "llm.safetensors", "missing")


# ---- interruption and full disks


def as_on_a_terminal():
    """A job that a shell put into the background, CI perhaps, ignores Ctrl-C and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_quantize(tmp_path, **how):
    """A quantization slow enough to be interrupted: the packing function takes its time."""
    slow = (
        "import sys, time; from cosyq import build; pack = build.pack\n"
        "def slowly(*a):\n    print('packing', flush=True); time.sleep(0.05); return pack(*a)\n"
        "build.pack = slowly\n"
        "from cosyq.cli.main import run; sys.exit(run(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", slow, "quantize", "fp32", *MUTE, "--source", str(GOLDEN), "--device", "cpu"]
    return subprocess.Popen(
        [*command, "-o", str(tmp_path / "artifact")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_quantize_leaves_nothing(tmp_path, number, code):
    process = start_quantize(tmp_path, preexec_fn=as_on_a_terminal)
    for _ in range(20):
        process.stdout.readline()  # it is at work
    assert [p.name.split("-")[0] for p in tmp_path.iterdir()] == [".artifact.partial"]
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    """The kernel refuses to let a file grow past a megabyte, as a full disk would."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # noqa: E731
    process = start_quantize(tmp_path, preexec_fn=limit)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3
    assert err.decode().strip().splitlines()[-1].startswith(f"error: {tmp_path / 'artifact'}: cannot be written")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_under_the_audio(artifact_of, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # noqa: E731
    code = (
        "import sys; from cosyq.cli.main import run\n"
        "for name in ('x.wav', 'x.flac'):\n"
        "    print(run(['synth', 'hello world', '-a', sys.argv[1], '-o', sys.argv[2] + '/' + name, '--seed', '3']))"
    )
    command = [sys.executable, "-c", code, artifact_of("int8"), tmp_path]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert done.stdout.split() == ["3", "3"], done.stderr
    assert done.stderr.count("cannot be written") == 2
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_synth_leaves_nothing(artifact_of, tmp_path):
    text = "hello world the quick brown fox " * 20
    command = [*COSYQ, "synth", text, "-a", artifact_of("int8"), "-o", tmp_path / "x.wav", "--stream"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=as_on_a_terminal)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().strip().splitlines()[-1] == "error: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_out_of_memory_is_exit_4(cli, monkeypatch, spoken, tmp_path):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 EiB\nlots of advice")

    monkeypatch.setattr("cosyq.runtime.engine.TorchEngine.mels", exhausted)
    refused(cli("synth", "hello", *spoken, "-o", tmp_path / "x.wav"), 4, "out of memory", "smaller recipe")
    monkeypatch.setattr("cosyq.build.pack", exhausted)
    refused(
        cli("quantize", "int8", *MUTE, "--source", GOLDEN, "-o", tmp_path / "a", "--device", "cpu"),
        4,
        "out of memory while packing llm.text_embedding",
    )
    assert list(tmp_path.iterdir()) == []


def test_a_bug_is_exit_1_and_shows_its_trace_when_asked(cli, monkeypatch, spoken, tmp_path):
    monkeypatch.setattr("cosyq.runtime.engine.TorchEngine.mels", lambda *_, **__: 1 / 0)
    line = refused(cli("synth", "hello", *spoken, "-o", tmp_path / "x.wav"), 1, "internal error", "ZeroDivisionError")
    assert "COSYQ_DEBUG=1" in line
    monkeypatch.setenv("COSYQ_DEBUG", "1")
    assert "Traceback" in cli("synth", "hello", *spoken, "-o", tmp_path / "x.wav")[2]


def test_random_checkpoint(cli, tmp_path):
    code, out, _ = cli("checkpoint", "random", tmp_path / "c", "--size", "small", "--json")
    assert code == 0
    assert json.loads(out)["bytes"] > 10e6
    refused(cli("checkpoint", "random", tmp_path / "c", "--size", "small"), 3, "exists already")
