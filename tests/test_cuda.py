"""The CUDA backend where there is no GPU: its kernels in Numba's simulator, in a process of its
own, and what it says in this one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import refattn
from cases import MECHANISMS, Shape
from refattn import gpu

ROOT = Path(__file__).parents[1]
SIMULATED = gpu.SIMULATED
x = np.ones((3, 2))


def run(*command, **more):
    """Run Python without what is set for this process of pytest."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env.pop("NUMBA_ENABLE_CUDASIM", None)
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=env | more
    )


@pytest.mark.slow
@pytest.mark.skipif(SIMULATED, reason="the tests in tests/cuda run in this process already")
def test_the_kernels_in_the_simulator():
    options = "-q", "-p", "no:cacheprovider", "--no-header", "tests/cuda"
    done = run("-m", "pytest", *options, NUMBA_ENABLE_CUDASIM="1")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 100


def test_without_the_simulator_these_tests_are_not_collected():
    done = run("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/cuda")
    assert done.returncode == 5 and "no tests collected" in done.stdout, done.stdout


LAZY = """
import sys
import refattn
print("numba" in sys.modules)
import refattn.{mechanism}.cuda
from numba.cuda.cudadrv.driver import driver
print(driver.pid)  # set where the driver is initialised
"""


@pytest.mark.parametrize(
    "path", sorted((ROOT / "refattn").glob("*/cuda.py")), ids=lambda p: p.parent.name
)
def test_importing_the_kernels_touches_no_driver(path):
    done = run("-c", LAZY.format(mechanism=path.parent.name))
    assert done.stdout.split() == ["False", "None"], done.stderr


@pytest.fixture
def outside(monkeypatch):
    """As in a process without the simulator."""
    monkeypatch.setattr(gpu, "SIMULATED", False)


def refusals(name):
    """What an attention and its gradient say."""
    mechanism = MECHANISMS[name]
    make = next(iter(mechanism.options.values()))
    options = make(Shape(3, 3, 2, 2), np.random.default_rng(0))
    for function, arrays in ((mechanism.attention, (x, x, x)), (mechanism.vjp, (x, x, x, x))):
        with pytest.raises(refattn.BackendUnavailable) as caught:
            function(*arrays, backend="cuda", **options)
        yield str(caught.value)


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_package_that_is_missing_is_named(name, monkeypatch, outside):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    for said in refusals(name):
        assert "backend 'cuda' needs the package 'numba-cuda'" in said
        assert "pip install 'numba-cuda[cu13]'" in said and "backend='numpy'" in said


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_gpu_that_is_missing_is_said(name, monkeypatch, outside):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(gpu.cuda, "is_available", lambda: False)
    for said in refusals(name):
        assert "NVIDIA GPU" in said and "nvidia-smi" in said
        assert "backend='numba'" in said and "NUMBA_ENABLE_CUDASIM=1" in said
