"""The README's commands and Python run as written, on the demo's artifact."""

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys

import pytest
import yaml
from conftest import GOLDEN, REPOSITORY

from cosyq.cli.main import app
from cosyq.cli.main import run as main
from cosyq.eval.gate import check
from cosyq.hub.client import files_folder
from cosyq.recipe import find_recipe, load_recipe, parse_recipe

README = (REPOSITORY / "README.md").read_text("utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def _demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    (folder / "recipes").symlink_to(REPOSITORY / "recipes")
    (line,) = re.findall(r"^\t\$\(BIN\)/cosyq (quantize .*)$", (REPOSITORY / "Makefile").read_text(), re.M)
    with contextlib.chdir(folder):
        assert main(shlex.split(line)) == 0
    return folder


@pytest.fixture
def demo(_demo, monkeypatch):
    """A folder as `make demo` leaves it, by the demo's own commands; tests begin in it."""
    monkeypatch.chdir(_demo)
    return _demo


def shell(folder, line):
    """Run a line in a shell; returns (stdout, stderr)."""
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-ec", line], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout, done.stderr


@pytest.fixture
def run(demo, cli):
    """Run a line: a plain call of cosyq in this process, which saves its start, and anything else in a shell."""

    def call(line):
        words = shlex.split(line, comments=True)
        if words[0] != "cosyq" or {"|", ">", "<", "&"} & set(words):
            return shell(demo, line)
        code, out, err = cli(*words[1:])
        assert code == 0, f"{line}\n{err}"
        return out, err

    return call


def test_the_examples_after_the_demo(demo, run):
    (block,) = [b for b in blocks("sh") if "synth" in b and "artifacts/cosyq-mini" in b]
    for line in block.splitlines():
        if not line.startswith(". "):
            run(line)
    assert {"out.wav", "out.s16le", "out.flac"} <= {p.name for p in demo.iterdir()}


def test_the_ways_in(demo, run):
    (block,) = [b for b in blocks("sh") if "lines.jsonl" in b]
    (demo / "chapter.txt").write_text("A chapter begins.\n\nAnd ends.")
    (demo / "lines.jsonl").write_text('{"id": "one", "text": "One."}\n{"id": "two", "text": "Two.", "seed": 2}\n')
    (demo / "chatbot").write_text("#!/bin/sh\nfor word in As the words come; do echo $word; sleep 0.1; done")
    (demo / "chatbot").chmod(0o755)
    for line in block.splitlines():
        out, _ = run(line)
        if "--jsonl" in line:
            assert [json.loads(result)["id"] for result in out.splitlines()] == ["one", "two"]
    assert {"chapter.wav", "chapter.srt", "answer.s16le"} <= {p.name for p in demo.iterdir()}
    assert (demo / "chapter.srt").read_text().count("-->") == 2
    assert (demo / "spoken" / "two.wav").is_file()


def test_the_python_example(demo):
    (code,) = [b for b in blocks("python") if "import cosyq" in b]
    done = subprocess.run([sys.executable, "-c", code], cwd=demo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(int(line) > 0 for line in done.stdout.split())


def test_the_server_and_its_clients(demo):
    """As written but for the port, which may be taken, and a key that nobody asks for."""
    (block,) = [b for b in blocks("sh") if "curl" in b]
    clients = [b for b in blocks("python") if "openai" in b or "websockets" in b]
    assert len(clients) == 2
    command, _, curl = block.partition("\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    arguments = [sys.executable, "-m", *shlex.split(command), "--port", port]
    server = subprocess.Popen(arguments, cwd=demo, stderr=subprocess.DEVNULL)
    try:
        ready = f"curl -sf --retry 60 --retry-delay 1 --retry-all-errors http://127.0.0.1:{port}/readyz"
        shell(demo, ready)
        shell(demo, curl.replace("8000", port))
        for code in clients:
            done = subprocess.run(
                [sys.executable, "-c", code.replace("8000", port)], cwd=demo, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
    finally:
        server.terminate()
        assert server.wait(20) == 0
    assert (demo / "hello.mp3").stat().st_size > 4000
    assert (demo / "hello.wav").stat().st_size > 20_000
    assert (demo / "answer.s16le").stat().st_size > 20_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, encoders_folder):
    """What the Hub has: a checkpoint with encoders."""
    folder = shutil.copytree(GOLDEN, tmp_path_factory.mktemp("hub") / "checkpoint")
    return shutil.copytree(encoders_folder, folder, dirs_exist_ok=True)


def test_the_commands_with_the_real_model(demo, run, checkpoint, cache):
    """As written but for the source, which is no download here, as the default voice's recording was one before."""
    (block,) = [b for b in blocks("sh") if "recipes/int8.yaml" in b]
    lines = [line.partition("#")[0].strip() for line in block.splitlines()]
    recording = GOLDEN.parent / "audio" / "zero_shot_prompt.wav"
    (sha256,) = (voice.sha256 for voice in load_recipe(find_recipe("int8")).voices)
    shutil.copy(recording, files_folder() / sha256)
    assert (cache / "assets") in files_folder().parents
    run(f"{lines[0]} --source {checkpoint}")
    run(lines[1].replace("DIR", str(checkpoint)))
    run(lines[2])
    assert (demo / "hello.wav").is_file()
    for artifact in ("fun-cosyvoice3-0.5b-int8", "mine"):
        assert (demo / "artifacts" / artifact / "voices" / "default.safetensors").is_file()


def test_how_fast_it_is(demo, run):
    """As written, but for the size, and fewer runs of fewer parts."""
    (block,) = [b for b in blocks("sh") if "--random full" in b and "cosyq verify" not in b]
    ours, random = (line.partition("#")[0] for line in block.splitlines())
    quick = "--runs 1 --seconds 1 --device cpu"
    assert "flow, 1 s of audio" in run(f"{ours} {quick} --parts flow")[0]
    assert "a token" in run(random.replace("full", "small").replace("parts all", "parts llm") + quick)[0]


def test_from_a_phone_recording_to_a_voice(demo, run):
    """As written but for the placeholder, and ffmpeg, whose work is done before."""
    (block,) = [b for b in blocks("sh") if "voice add me" in b]
    convert, *lines = (line.replace("ARTIFACT", "artifacts/cosyq-mini") for line in block.splitlines())
    assert len(lines) == 2
    assert convert == "ffmpeg -i memo.m4a memo.wav"
    shutil.copy(GOLDEN.parent / "audio" / "zero_shot_prompt.wav", demo / "memo.wav")
    run(lines[0])
    run(lines[1])
    assert (demo / "me.wav").is_file()
    export = re.search(r"`(cosyq voice export [^`]*)`", " ".join(README.split()))[1]
    run(export.replace("ARTIFACT", "artifacts/cosyq-mini"))
    run('cosyq synth "And here." -a artifacts/cosyq-mini -v me.safetensors -o elsewhere.wav')


def test_to_and_from_the_hub(demo, run, hub):
    """As written but for the placeholders."""
    (block,) = [b for b in blocks("sh") if "cosyq push ARTIFACT" in b and "hf://" in b]
    written = block.replace("ARTIFACT", "artifacts/cosyq-mini").replace("ME/", "me/")
    dry, push, synth, pull = (line.partition("#")[0] for line in written.splitlines())
    run(dry)
    assert hub.repositories == {}
    done = json.loads(run(push)[0])
    ((repo, repository),) = hub.repositories.items()
    assert done["commit_url"] == f"{hub.address}/{repo}/commit/{repository.branches['main']}"
    assert f"@{done['commit']}" in run(synth)[1]
    run(pull)
    assert (demo / "artifacts" / "pulled" / "README.md").is_file()
    assert not (demo / "artifacts" / "pulled" / "voices").exists()
    shutil.rmtree(demo / "artifacts" / "pulled")


def test_the_pipeline(demo, run, checkpoint, cache, hub):
    """Its commands as written, but for the source and the placeholder."""
    (block,) = [b for b in blocks("yaml") if "HF_TOKEN" in b]
    steps = yaml.safe_load(block)["jobs"]["model"]["steps"]
    install, quantize, verify, push = (step["run"] for step in steps if "run" in step)
    assert install == "pip install cosyq"
    run(f"{quantize} --source {checkpoint} --set voices=[]")
    assert json.loads(run(verify)[0])["files"] == 5
    done = json.loads(run(push.replace("ME/", "me/"))[0])
    assert done["changed"]
    assert hub.repositories["me/my-voice-model"].branches["main"] == done["commit"]


def test_what_it_lost(demo, run, monkeypatch):
    """As written but for the placeholder and fewer texts, and a gate that nothing is measured for but its name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(demo / "cache"))
    (line,) = [b.strip() for b in blocks("sh") if b.startswith("cosyq eval")]
    run(line.replace("ARTIFACT", "artifacts/cosyq-mini") + " --limit 2")
    assert (demo / "report.html").read_text("utf-8").count("<article") == 2
    assert json.loads((demo / "artifacts" / "cosyq-mini" / "eval.json").read_text("utf-8"))["findings"]
    (gate,) = [b for b in blocks("yaml") if b.startswith("gate:")]
    recipe = parse_recipe(find_recipe("mini").read_text("utf-8") + gate, "README.md", [])
    check(recipe)
    assert recipe.gate.keys() == {"llm.kl", "flow.lsd"}


def test_the_most_for_the_bytes(demo, run, monkeypatch):
    """As written but with rules that leave two layers' formats open, so that it takes seconds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(demo / "cache"))
    (line,) = [b.strip() for b in blocks("sh") if b.startswith("cosyq tune")]
    rules = 'rules=[{match: "re:llm.layers.*|flow.*(attn.*|up|[0-5].ff.down)", weights: nf4}]'
    run(f"{line} --sequences 2 --set '{rules}'")
    assert json.loads((demo / "tuned.json").read_text("utf-8"))["bytes"] <= 15_000_000
    plan = json.loads(run("cosyq quantize tuned.yaml --dry-run --json")[0])
    assert plan["bytes"] <= 15_000_000


def test_the_export(demo, run):
    (line,) = [b.strip() for b in blocks("sh") if "cosyq export" in b and "cosyq verify" not in b]
    run(line.replace("ARTIFACT", "artifacts/cosyq-mini"))
    assert (demo / "llm-for-transformers" / "config.json").is_file()


def test_links_lead_somewhere():
    anchors = {
        re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
        for line in README.splitlines()
        if line[:1] == "#"
    }
    for target in re.findall(r"\]\(([^)]*)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif "://" not in target:
            assert (REPOSITORY / target).is_file()


def test_every_command_is_listed_and_every_listed_one_exists():
    (block,) = [b for b in blocks("sh") if "cosyq verify" in b]
    listed = {line.split()[1] for line in block.splitlines() if line.startswith("cosyq ")}
    registered = {c.name for c in app.registered_commands} | {g.name for g in app.registered_groups}
    assert listed == registered


def test_the_set_up_commands_are_targets():
    makefile = (REPOSITORY / "Makefile").read_text()
    for line in blocks("sh")[0].splitlines():
        assert re.search(rf"^{line.split()[1]}:", makefile, re.M)
    assert "make test" in (REPOSITORY / ".ci" / "run").read_text()
