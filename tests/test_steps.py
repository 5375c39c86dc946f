"""The steps from the textbook formula to FlashAttention all give the same answer."""

import math
import warnings

import numpy as np
import pytest

from cases import softmax_tolerance
from definitions.softmax import softmax_attention as definition
from numbers_of import exact
from refattn.softmax import steps

FUNCTIONS = {
    "naive": steps.naive,
    "stable": steps.stable,
    "online": steps.online,
    "tiled": lambda *qkv, **options: steps.tiled(*qkv, block_q=3, block_k=2, **options)[0],
}


def tolerance(q, k, v, options):
    return softmax_tolerance(q, k, v, options, float(np.finfo(float).eps))


def inputs(n=7, m=9, d=4, e=5, dtype=np.float64):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s).astype(dtype) for s in ((n, d), (m, d), (m, e))]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("shape", [(7, 9, 4, 5), (1, 1, 1, 1), (9, 2, 3, 1)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_step_is_softmax_attention(name, shape, scale):
    q, k, v = inputs(*shape)
    truth = exact(definition, q, k, v, {"scale": scale})
    y = FUNCTIONS[name](q, k, v, scale=scale)
    # online and tiled rescale what they hold once for each key or tile
    assert abs(y - truth).max() <= (len(k) + 1) * tolerance(q, k, v, {"scale": scale})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_only_the_naive_form_overflows(name):
    q, k, v = inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = FUNCTIONS[name](1e4 * q, k, v)
    assert np.isnan(y).any() == (name == "naive")


@pytest.mark.parametrize(("block_q", "block_k"), [(1, 1), (2, 3), (7, 9), (50, 50), (3, 1)])
def test_tiled_counts_its_traffic(block_q, block_k):
    """Against the paper's totals: K and V once; Q, O, l and m once for each block of keys."""
    n, m, d, e = 7, 9, 4, 5
    q, k, v = inputs(n, m, d, e)
    y, lse, traffic = steps.tiled(q, k, v, block_q=block_q, block_k=block_k)
    truth, truth_lse = exact(definition, q, k, v, {"return_lse": True})
    assert abs(y - truth).max() <= 10 * tolerance(q, k, v, {})
    np.testing.assert_allclose(lse, truth_lse, rtol=1e-14)
    passes = math.ceil(m / block_k)
    assert traffic.loads == m * (d + e) + passes * n * (d + e + 2)
    assert traffic.stores == passes * n * (e + 2)


def test_tile_sizes_fit_the_fast_memory():
    for fast, d in [(1000, 8), (16384, 64), (25_000, 128), (7, 4)]:
        block_q, block_k = steps.tile_sizes(fast, d)
        assert block_k == math.ceil(fast / (4 * d)) and block_q == min(block_k, d)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dtype_is_kept(name):
    assert FUNCTIONS[name](*inputs(dtype=np.float32)).dtype == np.float32


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_head_with_keys_only(name):
    with pytest.raises(ValueError, match="one head"):
        FUNCTIONS[name](*np.ones((3, 2, 4, 4)))
    with pytest.raises(ValueError, match="at least one key"):
        FUNCTIONS[name](np.ones((2, 3)), np.ones((0, 3)), np.ones((0, 3)))
