"""The import graph of the package, held to the levels it was designed in."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import cosyq

PACKAGE = Path(cosyq.__file__).parent

# A file imports lower levels, or files of its own folder.
LEVELS = {
    "errors": 0,
    "files": 1,
    "recipe": 1,
    "text": 1,
    "model": 1,
    "hub": 2,
    "audio": 2,
    "checkpoint": 2,
    "kernels": 2,
    "quantize": 2,
    "artifact": 3,
    "voices": 3,
    "audit": 4,
    "build": 4,
    "export": 4,
    "runtime": 4,
    "random_model": 4,
    "lossless": 5,
    "sequences": 5,
    "eval": 6,
    "calibrate": 6,
    "tune": 7,
    "publish": 5,
    "doctor": 5,
    "server": 5,
    "bench": 6,
    "cli": 8,
}


@functools.cache
def modules():
    return list(_modules())


def _modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and name != "__main__":
            yield name, path


@functools.cache
def imports(path):
    """(imported module, whether at the top of the file)."""
    return list(_imports(path))


def _imports(path):
    tree = ast.parse(path.read_text("utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, id(node) in top


EDGES = [
    (name, target.removeprefix("cosyq."))
    for name, path in modules()
    for target, _ in imports(path)
    if target.startswith("cosyq.")
]


def level(name):
    return LEVELS[name.partition(".")[0]]


def folder(name):
    return name.partition(".")[0]


def test_every_module_has_a_level():
    assert {folder(name) for name, _ in modules()} == set(LEVELS)


@pytest.mark.parametrize(("name", "target"), sorted(set(EDGES)))
def test_imports_point_down(name, target):
    if folder(name) != folder(target):
        assert level(target) < level(name), f"cosyq.{name} imports cosyq.{target}"


def reachable(start):
    found, todo = set(), [start]
    while todo:
        name = todo.pop()
        for source, target in EDGES:
            if source == name:
                for candidate in (target, target.rpartition(".")[0]):
                    if candidate and candidate not in found and any(candidate == m for m, _ in modules()):
                        found.add(candidate)
                        todo.append(candidate)
    return found


def test_speaking_cannot_quantize_again():
    """The run side reaches nothing that reads recipes or checkpoints or packs weights."""
    for start in ("runtime.synthesizer", "runtime.engine", "server.batch"):
        reached = reachable(start)
        assert "quantize.linear" in reached
        for forbidden in ("checkpoint", "recipe", "build", "quantize.pack", "quantize.plan", "hub"):
            assert not {r for r in reached if r == forbidden or r.startswith(forbidden + ".")}


@pytest.mark.parametrize(
    ("library", "home"),
    [
        ("bitsandbytes", {"quantize.backend"}),
        ("huggingface_hub", {"hub.client", "hub.hashes", "hub.push", "hub.snapshot"}),
        ("urllib", {"hub.web"}),
        ("yaml", {"recipe", "checkpoint.hyperyaml"}),
        ("pydantic", {"recipe", "cli.batch", "server.schemas", "server.ray"}),
        ("fastapi", {"server.app"}),
        ("ray", {"server.ray"}),
        ("uvicorn", {"server.run"}),
        ("av", {"server.compressed"}),
        ("prometheus_client", {"server.metrics"}),
        (
            "typer",
            {name for name, _ in modules() if name.startswith("cli.")} - {"cli.batch", "cli.reading", "cli.starting"},
        ),
        ("onnxruntime", {"voices.enrol"}),
        ("soxr", {"audio.recording"}),
        ("kaldi_native_fbank", {"audio.features"}),
        ("wetext", {"text.engine"}),
        (
            "triton",
            {name for name, _ in modules() if name.startswith("kernels.device.")} | {"kernels.flow_products"},
        ),
        ("jinja2", {"eval.page"}),
        ("soundfile", {"audio.recording", "audio.sinks"}),
        ("transformers", set()),  # and the recognizers: eval.recognizers imports what is named, by its name
        ("distillmos", {"eval.opinion"}),
        ("torchaudio", set()),
        ("pickle", {"checkpoint.tensors"}),  # for the name of its error
    ],
)
def test_a_library_has_one_home(library, home):
    users = {name for name, path in modules() for target, _ in imports(path) if target.partition(".")[0] == library}
    assert users == home


def test_the_text_package_needs_no_torch():
    code = "import sys, cosyq.text.tokenizer, cosyq.text.prompt; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_server_knows_its_speaker_by_its_interface_alone():
    """What answers over HTTP loads no torch and reaches no engine: the one that speaks can be another."""
    code = "import sys, cosyq.server.run; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not {r for r in reachable("server.run") if r == "server.batch" or r.startswith(("runtime", "artifact"))}


def test_only_the_command_line_prints():
    for name, path in modules():
        if not name.startswith("cli"):
            calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
            assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], name
