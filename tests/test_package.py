"""The wheel and the source distribution: what they need, nothing else, and a machine that has only them."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import soundfile
from conftest import REPOSITORY

from cosyq import __version__

WHEEL, SDIST = f"cosyq-{__version__}-py3-none-any.whl", f"cosyq-{__version__}.tar.gz"
MOVED = {"recipes/": "cosyq/recipes/", "training/mini/model/": "cosyq/mini/"}  # where a wheel has what a checkout has
TOP = {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with both, the wheel made from the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def tracked(*places):
    done = subprocess.run(["git", "ls-files", *places], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


def test_the_wheel_holds_the_package_its_recipes_and_the_small_model(built):
    names = set(zipfile.ZipFile(built / WHEEL).namelist())
    about = {name for name in names if name.startswith(f"cosyq-{__version__}.dist-info/")}
    expected = {
        next((new + name.removeprefix(old) for old, new in MOVED.items() if name.startswith(old)), name)
        for name in tracked("cosyq", *MOVED)
    }
    assert names - about == expected
    assert {name.partition("/")[2] for name in about} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
    }


def test_the_source_distribution_holds_what_makes_the_wheel(built):
    with tarfile.open(built / SDIST) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert names - {"PKG-INFO", ".gitignore"} == tracked("cosyq", *MOVED) | TOP


def test_the_container_is_given_what_makes_the_wheel(built, tmp_path):
    """What the Dockerfile copies, and .dockerignore lets through, makes the same wheel. No image is built here."""
    lines = (REPOSITORY / "Dockerfile").read_text().splitlines()
    let_through = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    copied = [line.split()[1:] for line in lines if line.startswith("COPY ") and "--from" not in line]
    for *sources, target in copied:
        assert set(sources) <= let_through
        for source in sources:
            place = tmp_path / (source if target == "./" else target)
            whole = (REPOSITORY / source).is_dir()
            (shutil.copytree if whole else shutil.copy)(REPOSITORY / source, place)
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wheels = [zipfile.ZipFile(folder / WHEEL) for folder in (tmp_path / "out", built)]
    assert {i.filename: i.CRC for i in wheels[0].infolist()} == {i.filename: i.CRC for i in wheels[1].infolist()}


def test_the_container_has_the_torch_of_the_tests():
    (pinned,) = re.findall(r"^TORCH \?= (.*)$", (REPOSITORY / "Makefile").read_text(), re.M)
    text = (REPOSITORY / "Dockerfile").read_text()
    assert re.findall(r"torch==\S+", text) == [pinned] * 2
    assert re.findall(r"^ARG PYTHON=(.*)$", text, re.M)[0].count(".") == 2  # a release, not a tag that moves


def test_a_clean_environment_speaks(built, tmp_path):
    """The wheel alone in an environment, its dependencies lent by this one: nothing of the checkout is in reach."""
    run = {"cwd": tmp_path, "capture_output": True, "text": True}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "venv"], check=True, **run)
    scripts = tmp_path / "venv" / "bin"
    install = ["-m", "pip", "--python", str(scripts / "python"), "install", "--no-deps", "--no-index", built / WHEEL]
    subprocess.run([sys.executable, *install], check=True, **run)
    (site,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib"))  # after its own; no .pth file of that one is read
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "COSYQ_ARTIFACT")}
    environment |= {"PATH": f"{scripts}:{os.environ['PATH']}", "HF_HOME": str(tmp_path / "home")}

    def shell(*command):
        done = subprocess.run(command, env=environment, **run)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        return done.stdout

    assert Path(shell("python", "-c", "import cosyq; print(cosyq.__file__)").strip()).is_relative_to(site)
    assert shell("cosyq", "--version") == f"cosyq {__version__}\n"
    assert shell("cosyq", "quantize", "mini", "--device", "cpu") == "artifacts/cosyq-mini\n"
    shell("cosyq", "synth", "Hello there.", "-o", "out.wav", "--seed", "1", "--device", "cpu")
    assert 0.2 < soundfile.info(tmp_path / "out.wav").duration < 5
    shell("cosyq", "recipes", "show", "int8")
    shell("cosyq", "doctor")
