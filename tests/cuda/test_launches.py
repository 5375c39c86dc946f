"""What is launched is what scripts/cuda_compile.py compiles: the same types of arguments.

The simulator takes arguments of any type; a GPU compiles a kernel once more for types that were not
looked at, and one number of float64 among them makes its arithmetic float64.
"""

import importlib
import pathlib

import numba
import numpy as np
import pytest

import refattn
from cases import MECHANISMS, Shape, cases, options_in
from refattn import gpu

ROOT = pathlib.Path(refattn.__file__).parent


def compiled():
    """Of each kernel that is compiled, by name: the signatures."""
    found = {}
    for path in sorted(ROOT.glob("*/cuda_*.py")):
        module = importlib.import_module(f"refattn.{path.parent.name}.{path.stem}")
        for _, function, signature, *_ in getattr(module, "instances", tuple)():
            found.setdefault(function.__name__, set()).add(tuple(signature))
    return found


@pytest.fixture
def launched(monkeypatch):
    """Fills up with (kernel, types) as kernels are launched."""
    seen, launch = set(), gpu.launch

    def watched(kernel, grid, block, inputs, outputs):
        types = (numba.typeof(on_device(x)) for x in (*inputs, *outputs))
        seen.add((kernel.py_func.__name__, tuple(types)))
        launch(kernel, grid, block, inputs, outputs)

    monkeypatch.setattr(gpu, "launch", watched)
    return seen


def on_device(x):
    """As it would be on a device: there all arrays can be written to."""
    if isinstance(x, tuple):
        return tuple(map(on_device, x))
    return x.copy() if isinstance(x, np.ndarray) else x


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", MECHANISMS)
def test_what_is_launched_was_compiled(name, dtype, launched):
    for case in cases([Shape(7, 7, 4, 5)]):
        if case.mechanism.name == name:
            q, k, v, options = case.build()
            q, k, v, options = *(x.astype(dtype) for x in (q, k, v)), options_in(options, dtype)
            y = case.mechanism.attention(q, k, v, backend="cuda", **options)
            case.mechanism.vjp(y, q, k, v, backend="cuda", **options)
    assert launched
    known = compiled()
    for kernel, types in sorted(launched, key=str):
        assert types in known.get(kernel, ()), (kernel, types)
