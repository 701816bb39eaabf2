"""A tokenizer in another process, in processes without torch, as a command's is before it imports it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import GOLDEN

from cosyq.artifact.reader import open_artifact
from cosyq.text import apart
from cosyq.text.tokenizer import TextTokenizer, special_tokens

TEXTS = [
    *json.loads((GOLDEN / "expected_text_ids.json").read_text("utf-8"))["texts"],
    "",
    "two\nlines\r\nand a\ttab\x00",
    "e\u0301 \u00e9 \u4f60\u597d\uff0c\U0001f600\u200d\u2764\ufe0f \u0928\u092e\u0938\u094d\u0924\u0947",
    "".join(special_tokens()),
    *(f"a{token} b" for token in special_tokens()),
    "long " * 20_000,  # more than a pipe holds
]
BEGIN = """
import json, os, signal, sys, time
from pathlib import Path
from cosyq.text import apart
path = Path(sys.argv[1])
apart.begin(path)
children = lambda: [int(p) for p in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
"""
ASK = """
tokenizer = apart.tokenizer_of(path)
texts = json.loads(sys.stdin.read())
half = len(texts) // 2
ids = [tokenizer.encode(text) for text in texts[:half]]
MIDST
ids += [tokenizer.encode(text) for text in texts[half:]]
lives = bool(children()) and os.waitpid(-1, os.WNOHANG) == (0, 0)
print(json.dumps([lives, len(tokenizer), tokenizer.end_of_prompt, ids]))
"""

linux = pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) == 1, reason="where a process can be begun beside this one"
)


def python(code, path, text=""):
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def file(artifact_of):
    return artifact_of("int8") / "tokenizer.json"


@linux
@pytest.mark.parametrize(
    ("midst", "lives"),
    [
        ("", True),
        ("os.kill(children()[0], signal.SIGKILL); os.wait()", False),
        ("os.kill(children()[0], signal.SIGINT)", True),
    ],
    ids=["undisturbed", "the child is killed", "Ctrl-C"],
)
def test_ids_are_those_of_the_library(file, midst, lives):
    expected = TextTokenizer(file.read_text("utf-8"))
    found = json.loads(python(BEGIN + ASK.replace("MIDST", midst), file, json.dumps(TEXTS)))
    assert found == [lives, len(expected), expected.end_of_prompt, [expected.encode(text) for text in TEXTS]]


@linux
def test_the_child_ends_with_its_parent(file):
    code = BEGIN + "apart.tokenizer_of(path).encode('x'); print(children()[0], flush=True); os.kill(os.getpid(), 9)"
    command = [sys.executable, "-c", code, str(file)]
    # Its end of stdout is the child's, too: this returns when neither has it.
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == -9
    for _ in range(100):
        status = Path(f"/proc/{int(done.stdout)}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.05)
    pytest.fail("it lives on")


@linux
def test_a_file_that_is_no_tokenizer_is_refused_as_ever(tmp_path):
    path = tmp_path / "tokenizer.json"
    ask = (
        "\ntry:\n    apart.tokenizer_of(path)\nexcept (ValueError, OSError) as error:\n    print(type(error).__name__)"
    )
    assert python(BEGIN + ask, path) == "FileNotFoundError\n"
    path.write_text("{}")
    assert python(BEGIN + ask, path) == "ValueError\n"


@linux
def test_a_process_with_threads_begins_none(file):
    code = "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()" + BEGIN
    assert python(code + "print(children(), type(apart.tokenizer_of(path)).__name__)", file) == "[] TextTokenizer\n"


def test_what_was_not_begun_is_read_here(artifact_of):
    artifact = open_artifact(artifact_of("int8"))
    assert isinstance(apart.tokenizer_of(artifact.folder / "tokenizer.json"), TextTokenizer)
    assert isinstance(artifact.tokenizer(), TextTokenizer)
