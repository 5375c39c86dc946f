"""Tests of the CUDA kernels in Numba's simulator, in a process of its own: tests/test_cuda.py
starts it, and by hand it is

    NUMBA_ENABLE_CUDASIM=1 python -m pytest tests/cuda

Without that variable nothing here is collected.
"""

import functools
import os

import numpy as np
import pytest

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    import simulator

    simulator.install()
else:
    collect_ignore_glob = ["*.py"]


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """Tiles of 8 rows, so that small arrays have several and a block has few threads. A test
    marked ``real_tiles`` has those that a GPU gets."""
    from refattn.linear import cuda_maps
    from refattn.softmax import cuda_tiles, cuda_tiles_backward

    if request.node.get_closest_marker("real_tiles"):
        for module in (cuda_tiles, cuda_tiles_backward):
            real = functools.partial(module.tile_of, small=False)
            monkeypatch.setattr(module, "tile_of", real)
        return
    for kind in (np.float32, np.float64):
        small = cuda_maps.Sizes(rows=8, depth=4, columns=8, side=4, span=16)
        monkeypatch.setitem(cuda_maps.SIZES, kind, small)


@pytest.fixture
def torch():
    """The library, whose arrays on the CPU stand for those on a device; skipped without it."""
    pytest.importorskip("array_api_compat")
    return pytest.importorskip("torch")


def pytest_configure(config):
    config.addinivalue_line("markers", "real_tiles: with the tiles that a GPU gets")
