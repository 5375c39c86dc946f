"""What a fresh clone promises: a lock without addresses, small files, an import that is quick."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import refattn

ROOT = Path(__file__).parents[1]
LAZY = ("numba", "scipy.sparse", "matplotlib", "torch", "safetensors", "tokenizers")


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def committed():
    """Paths that git tracks; the test is skipped where there is no git or no checkout."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode != 0 or not found.stdout:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in found.stdout.split("\0") if name]


def names(requirements):
    """Normalised project names of requirement lines."""
    found = (re.match(r"[A-Za-z0-9._-]+", line) for line in requirements)
    return {re.sub(r"[-_.]+", "-", match[0]).lower() for match in found if match}


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("name", ["requirements.txt", "constraints.txt", "pyproject.toml"])
def test_requirements_name_no_address_and_no_path(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"://|--(extra-)?index-url|--find-links|^/|@ ", text, re.MULTILINE)


def test_lock_pins_every_requirement():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"[\w.-]+==[\w.]+( ; .+)?$", line) for line in lines), lines
    extras = project()["optional-dependencies"]
    asked = names(sum(extras.values(), project()["dependencies"]))
    assert asked <= names(lines), f"run make lock: {asked - names(lines)} not in constraints.txt"


def test_requirements_use_the_lock():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines == ["-c constraints.txt", "-e .[notebooks,test]"]


def test_version_is_the_one_of_the_project():
    assert refattn.__version__ == project()["version"]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_help_lists_every_target():
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    listed = re.findall(r"^make ([\w-]+) +\S", run("make", "--no-print-directory", cwd=ROOT), re.M)
    assert sorted(listed) == sorted(phony[1].split())


def test_committed_files_are_small():
    large = [p.name for p in committed() if p.is_file() and p.stat().st_size > 5e6]
    assert not large


def test_committed_files_name_no_machine():
    """Notebook outputs easily carry the path of a traceback or a warning."""
    text = [p for p in committed() if p.suffix in (".ipynb", ".svg", ".csv", ".json", ".txt")]
    home = re.compile(r"/home/\w|/Users/\w|/root/|/tmp/\w|site-packages|dist-packages")
    named = [p.name for p in text if p.is_file() and home.search(p.read_text(encoding="utf-8"))]
    assert not named


IMPORT = """
import sys, time
import numpy
start = time.perf_counter()
import refattn
print(time.perf_counter() - start)
print(*[name for name in {lazy} if name in sys.modules])
"""


def test_import_is_quick_and_lazy():
    # The quickest of some runs: the machine may be busy with something else.
    code = IMPORT.format(lazy=LAZY)
    runs = [run(sys.executable, "-c", code, cwd=ROOT).splitlines() for _ in range(4)]
    assert runs[0][1] == "", f"import refattn loads {runs[0][1]}"
    assert min(float(seconds) for seconds, _ in runs) < 0.3


UNINSTALLED = """
import importlib.metadata
def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = importlib.metadata.distribution = missing
import numpy, refattn
print(refattn.__file__)
x = numpy.eye(3)
assert refattn.softmax_attention(x, x, x).shape == (3, 3)
"""


def test_works_from_a_clone_that_is_not_installed(tmp_path):
    clone, elsewhere = tmp_path / "a clone", tmp_path / "elsewhere"
    shutil.copytree(ROOT / "refattn", clone / "refattn")
    elsewhere.mkdir()
    env = os.environ | {"PYTHONPATH": str(clone)}
    out = run(sys.executable, "-c", UNINSTALLED, cwd=elsewhere, env=env)
    assert Path(out.strip()).is_relative_to(clone)
