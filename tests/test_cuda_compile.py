"""The CUDA kernels through the real compiler and assembler, where these are installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import refattn

SCRIPT = Path(__file__).parents[1] / "scripts" / "cuda_compile.py"


def script():
    spec = importlib.util.spec_from_file_location("cuda_compile", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


cuda_compile = script()


@pytest.mark.slow
def test_every_kernel_compiles_and_fits():
    if cuda_compile.missing():
        pytest.skip(cuda_compile.missing())
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" sm_80") == done.stdout.count(" sm_90") > 5


def test_the_table_that_is_shipped_names_every_kernel():
    """After a change of the kernels: make gpu-check."""
    code = "import sys; sys.path.insert(0, 'scripts'); import cuda_compile as c; "
    code += "print(*[label for label, *_ in c.numbered()], sep='\\n')"
    env = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=SCRIPT.parents[1]
    )
    assert done.returncode == 0, done.stderr
    shipped = [(kernel["label"], kernel["card"]) for kernel in refattn.datasets.load_kernels()]
    labels = done.stdout.splitlines()
    assert shipped == [(label, card) for label in labels for card in ("sm_80", "sm_90")]


def of(**changes):
    """The complaints about a kernel that fits, but for these changes."""
    fine = dict(registers=64, shared=1024, stack=0, spills=0, float64=0, tuned=True, threads=256)
    return list(cuda_compile.Compiled("a kernel", (9, 0), **(fine | changes)).complaints())


def test_what_does_not_fit_is_said():
    assert of() == of(registers=255) == []
    assert "1024 threads of 65 registers" in of(threads=1024, registers=65)[0]
    assert "49153 bytes" in of(shared=49153)[0]
    for name in ("stack", "spills", "float64"):
        assert f"its {name} is 8" in of(**{name: 8})[0]
        assert of(**{name: 8}, tuned=False) == []
