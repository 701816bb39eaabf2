"""`cosyq serve` as a process, speaking with cosyq-mini to OpenAI's own client."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import openai
import pytest
from serving import BODY, COSYQ, Process, decoded, seconds_of, wait_for

import cosyq
from cosyq.audio.sinks import to_s16
from cosyq.cli.main import run
from cosyq.cli.serve import _folder
from cosyq.server.encoders import WIRES

TEXT = "Hello there."
LONG = "My grandmother used to bake bread every Saturday. Thank you very much. "


@pytest.fixture(scope="module")
def server(mini_artifact, tmp_path_factory):
    process = Process(mini_artifact, tmp_path_factory.mktemp("served"))
    yield process
    assert process.stop() == 0


@pytest.fixture(scope="module")
def spoken(mini_artifact):
    """The same text by the library, one seed: [n] samples as a stream makes them."""
    tts = cosyq.load(mini_artifact, device="cpu")
    return np.concatenate([audio.samples for audio in tts.stream(TEXT, voice="default", seed=7)])


def ask(format, **more):
    return {
        "model": "tts-1",
        "voice": "alloy",
        "input": TEXT,
        "response_format": format,
        "extra_body": {"seed": 7},
    } | more


@pytest.mark.parametrize("format", list(WIRES))
def test_openais_client_hears_what_the_library_says(server, spoken, format):
    data = server.client().audio.speech.create(**ask(format)).content
    assert seconds_of(data, format) == pytest.approx(len(spoken) / 24_000, abs=0.05)
    if format == "pcm":
        assert data == to_s16(spoken)


@pytest.mark.parametrize("speed", [0.25, 4.0])
def test_openais_client_hears_it_at_any_speed(server, spoken, speed):
    data = server.client().audio.speech.create(**ask("pcm", speed=speed)).content
    assert seconds_of(data, "pcm") == pytest.approx(len(spoken) / 24_000 / speed, abs=0.05)


def test_openais_client_hears_it_as_it_is_made(server):
    with server.client().audio.speech.with_streaming_response.create(**ask("mp3", input=LONG)) as response:
        started = time.monotonic()
        arrived = [(time.monotonic() - started, data) for data in response.iter_bytes()]
    assert seconds_of(b"".join(data for _, data in arrived), "mp3") > 4
    assert arrived[0][0] < 0.4 * arrived[-1][0]


def test_openais_client_gets_its_own_errors(server):
    with pytest.raises(openai.BadRequestError) as refusal:
        server.client().audio.speech.create(**ask("mp3", voice="nobody"))
    assert (refusal.value.param, refusal.value.code) == ("voice", "voice_not_found")
    with pytest.raises(openai.NotFoundError):
        server.client().audio.speech.create(**ask("mp3", model="tts-9"))


def test_another_voice_is_another(server, spoken):
    data = server.client().audio.speech.create(**ask("pcm", voice="magnus")).content
    assert data != to_s16(spoken)
    voices = json.loads(server.get("/v1/audio/voices")[1])
    assert [voice["id"] for voice in voices["voices"]] == ["default", "iris", "magnus", "nora", "pip"]
    assert voices["aliases"]["alloy"] == "default"


def test_health_is_of_the_artifact(server):
    health = json.loads(server.get("/health")[1])
    assert health["artifact"] == "cosyq-mini"
    assert health["quantization"] == {"llm": "int8", "flow": "int8", "vocoder": "fp32"}


def test_several_at_once_hear_what_each_would_hear_alone(server, mini_artifact):
    def hear(seed):
        asked = ask("pcm", input="Hi.", extra_body={"seed": seed})
        heard[seed] = server.client().audio.speech.create(**asked).content

    heard, tts = {}, cosyq.load(mini_artifact, device="cpu")
    threads = [threading.Thread(target=hear, args=(seed,)) for seed in range(5)]  # one more than are spoken at once
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for seed in range(5):
        alone = np.concatenate([audio.samples for audio in tts.stream("Hi.", voice="default", seed=seed)])
        assert heard[seed] == to_s16(alone)


def test_a_client_that_leaves_frees_the_model_at_its_next_step(server):
    """Measured by the server itself, from the closed connection to the model's rest."""
    connection = server.open(BODY | {"input": LONG})
    assert connection.getresponse().read1(100)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    wait_for(lambda: server.metric("cosyq_cancel_seconds_count") == 1)
    assert server.metric("cosyq_active_requests") == 0
    # To the end of one Euler step and one step for the rows, 20 to 60 ms of a CPU that has nothing else to do.
    assert server.metric("cosyq_cancel_seconds_sum") < 0.3
    assert server.metric('cosyq_requests_total{outcome="cancelled"}') == 1


def test_leaving_at_any_of_ten_points_leaves_nothing_behind(server, spoken):
    """From before the answer to shortly before its end; then the next one hears what the first has heard."""

    def outcomes():
        return [server.metric(f'cosyq_requests_total{{outcome="{name}"}}') for name in ("cancelled", "ok")]

    def cancelling():
        return np.array([server.metric(f"cosyq_cancel_seconds_{part}") for part in ("sum", "count")])

    body, started = BODY | {"response_format": "pcm", "seed": 7}, time.monotonic()
    whole = server.open(body).getresponse().read()
    took, before, cancels = time.monotonic() - started, outcomes(), cancelling()
    assert whole == to_s16(spoken)
    for tenth in range(10):
        connection = server.open(body)
        time.sleep(took * tenth / 10)
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        wait_for(lambda tenth=tenth: sum(outcomes()) - sum(before) == tenth + 1)
        wait_for(lambda: server.metric("cosyq_active_requests") == server.metric("cosyq_queue_depth") == 0)
    assert outcomes()[0] - before[0] >= 3  # the rest may have been spoken before the client was seen to leave
    seconds, count = cancelling() - cancels
    assert seconds < 0.3 * count  # as above
    assert server.open(body).getresponse().read() == whole


def test_a_signal_lets_the_stream_finish(mini_artifact, tmp_path):
    server = Process(mini_artifact, tmp_path, "--drain", "60")
    response = server.open(BODY | {"input": LONG, "response_format": "flac", "seed": 7}).getresponse()
    early = response.read1(1000)
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: server.logged("draining"))
    assert server.get("/readyz") == (503, '{"status": "draining"}')
    assert len(decoded(early + response.read(), "flac")[0]) > 4 * 24_000
    assert server.process.wait(10) == 0


def test_the_environment_is_heard_and_what_it_does_not_mean_is_named(mini_artifact, tmp_path):
    variables = {"COSYQ_API_KEY": "one two", "COSYQ_PROT": "1", "COSYQ_DRAIN": "0.2", "COSYQ_MAX_CHARACTERS": "1000"}
    server = Process(mini_artifact, tmp_path, "--host", "0.0.0.0", COSYQ_ARTIFACT="nowhere", **variables)
    with pytest.raises(openai.BadRequestError, match="1001 characters are more than 1000"):
        server.client("one").audio.speech.create(**ask("pcm", input="a" * 1001))
    with pytest.raises(openai.AuthenticationError):
        server.client("three").audio.speech.create(**ask("pcm"))
    log = server.log.read_text()
    assert "warning: COSYQ_PROT means nothing here" in log
    assert "COSYQ_ARTIFACT means" not in log
    assert "without a key" not in log
    # And the time that a stop leaves to a stream is as it says.
    speak = server.client("two").audio.speech.with_streaming_response.create
    with speak(**ask("pcm", input=LONG * 10)) as response:
        parts = response.iter_bytes()
        assert next(parts)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(Exception, match="incomplete chunked read"):
            list(parts)
    assert server.process.wait(10) == 0
    assert time.monotonic() - started < 5


# ---- what ends before it begins


@pytest.fixture
def cli(capsys, monkeypatch):
    for name in [n for n in os.environ if n.startswith(("COSYQ_", "QUANTIZATION_"))]:
        monkeypatch.delenv(name)

    def call(*arguments):
        return run(["serve", *map(str, arguments)]), capsys.readouterr().err

    return call


def test_what_is_wrong_is_said_in_one_line(cli, mini_artifact, server, monkeypatch):
    code, err = cli("-a", mini_artifact, "--port", server.port)
    assert code == 2
    assert re.search(r"error: 127\.0\.0\.1:\d+: cannot listen there \(Address already in use\)", err)
    code, err = cli("-a", mini_artifact, "--host", "no.such.host.invalid")
    assert code == 2
    assert "cannot listen there" in err
    assert "warning: whoever reaches no.such.host.invalid:8000 can speak without a key" in err
    monkeypatch.setitem(sys.modules, "av", None)
    code, err = cli("-a", mini_artifact, "--port", server.port)
    assert code == 2
    assert "no format but wav and pcm without av; install them with `pip install 'cosyq[serve]'`" in err
    monkeypatch.setitem(sys.modules, "fastapi", None)
    code, err = cli("-a", mini_artifact)
    assert code == 2
    assert "the server's packages are not here (fastapi)" in err
    assert "pip install 'cosyq[serve]'" in err


@pytest.mark.parametrize(
    ("artifact", "device", "code", "said"),
    [("mini", "cuda:99", 4, "error: cuda:99: "), ("nothing", "cpu", 3, "error: nothing: no such artifact")],
)
def test_what_cannot_be_loaded_ends_it(mini_artifact, tmp_path, artifact, device, code, said):
    folder = mini_artifact if artifact == "mini" else artifact
    command = [*COSYQ, "serve", "-a", str(folder), "--port", "0", "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == code
    assert done.stderr.splitlines()[-1].startswith(said)
    assert "Traceback" not in done.stderr


def test_quantization_variables_choose_among_the_artifacts(artifact_of, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    for age, recipe in enumerate(("nf4", "int8", "bf16")):
        folder = tmp_path / "artifacts" / recipe
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_bytes((artifact_of(recipe) / "manifest.json").read_bytes())
        os.utime(folder / "manifest.json", (age, age))
    wanted = {
        ("", ""): "bf16",  # the newest
        ("true", "8"): "int8",
        ("true", "4"): "nf4",
        ("", "4"): "nf4",
        ("true", ""): "int8",
        ("false", "4"): "bf16",
    }
    for (enabled, bits), name in wanted.items():
        monkeypatch.setenv("QUANTIZATION_ENABLED", enabled)
        monkeypatch.setenv("QUANTIZATION_BITS", bits)
        assert _folder(None).name == name
    assert _folder("mine") == Path("mine")
    monkeypatch.setenv("QUANTIZATION_BITS", "3")
    monkeypatch.setenv("QUANTIZATION_ENABLED", "1")
    code, err = cli()
    assert code == 2
    assert "QUANTIZATION_BITS: not understood" in err
    monkeypatch.setenv("QUANTIZATION_BITS", "8")
    for unusable in ("{}", '{"minimum_reader": 9}'):
        (tmp_path / "artifacts" / "int8" / "manifest.json").write_text(unusable)
        code, err = cli()
        assert code == 3
        assert "no artifact with int8 there" in err


def test_it_listens_before_torch_is_there(mini_artifact):
    """Probes are answered while the seconds go by that torch takes."""
    code = """
import os, sys
import cosyq.server.run
from cosyq.cli.main import run
cosyq.server.run.serve = lambda settings, listening, loader: os._exit(10 + ("torch" in sys.modules))
run(["serve", "--port", "0", "-a", sys.argv[1]])
"""
    done = subprocess.run([sys.executable, "-c", code, str(mini_artifact)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 10, done.stderr


def test_a_stop_does_not_end_the_thread_that_loads(mini_artifact):
    """Which may be in the midst of a driver's code, where it cannot end: then Python must not try."""
    code = """
import atexit, os, signal, sys, threading, time
import cosyq.server.batch
from cosyq.cli.main import run

def load(*given, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

cosyq.server.batch.load_speaker = load
atexit.register(print, "Python ended")
run(["serve", "--port", "0", "-a", sys.argv[1]])
"""
    done = subprocess.run([sys.executable, "-c", code, str(mini_artifact)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert '"draining"' in done.stderr
