"""Compiled kernels on sizes, windows, masks and gates that nobody chose."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refattn
from refattn.verify.cases import Trial
from refattn.verify.like import Reference
from refattn.verify.wanted import wanted_of

FEW = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def problems(draw, square=False):
    """q, k, v, dy of one to three heads, and a generator."""
    n = draw(st.integers(1, 150))
    m = n if square else draw(st.integers(1, 150))
    d, e = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    lead = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    shapes = ((n, d), (m, d), (m, e), (n, e))
    return [rng.standard_normal((*lead, *s)).astype(dtype) for s in shapes], rng


def holds(name, arrays, **options):
    """Forward and gradient within the grader's budget."""
    q, k, v, dy = arrays
    y = getattr(refattn, name)(q, k, v, backend="numba", **options)
    grads = getattr(refattn, f"{name}_vjp")(dy, q, k, v, backend="numba", **options)
    wide = {
        key: x.astype(float) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x
        for key, x in options.items()
    }
    wanted = wanted_of(Reference(name), Trial("", q, k, v, dy), options, wide, gradients=True)
    for part, x in zip(("y", "dq", "dk", "dv"), (y, *grads), strict=False):
        assert x.shape == wanted[part].value.shape
        assert abs(x - wanted[part].value).max(initial=0) <= wanted[part].budget, part


@FEW
@given(problems(), st.booleans(), st.floats(0, 1), st.sampled_from([None, 2.0]))
def test_softmax(problem, causal, density, softcap):
    arrays, rng = problem
    mask = rng.random((arrays[0].shape[-2], arrays[1].shape[-2])) < density
    holds("softmax_attention", arrays, causal=causal, mask=mask, softcap=softcap)


@FEW
@given(problems(), st.tuples(st.integers(0, 200), st.integers(0, 70)), st.integers(1, 5))
def test_local(problem, window, dilation):
    holds("local_attention", problem[0], window=window, dilation=dilation)


@FEW
@given(problems(), st.floats(0, 0.6))
def test_sparse(problem, density):
    import scipy

    arrays, rng = problem
    mask = scipy.sparse.csr_array(rng.random((arrays[0].shape[-2], arrays[1].shape[-2])) < density)
    holds("sparse_attention", arrays, mask=mask)


@FEW
@given(problems(square=True), st.booleans(), st.sampled_from(["elu", "relu", "taylor"]))
def test_linear(problem, causal, feature_map):
    arrays, rng = problem
    arrays = [x[..., :6] for x in arrays]
    name = "linear_attention_chunked" if causal and rng.random() < 0.5 else "linear_attention"
    holds(name, arrays, causal=causal, feature_map=feature_map)


@FEW
@given(problems(square=True), st.booleans())
def test_performer(problem, causal):
    arrays, rng = problem
    d = arrays[0].shape[-1]
    omega = refattn.random_features(24, d, rng=rng).astype(arrays[0].dtype)
    holds("performer_attention", arrays, causal=causal, omega=omega)


@FEW
@given(problems(square=True), st.integers(1, 160), st.sampled_from(["mean", "max"]))
def test_blocks(problem, block, pool):
    arrays, _ = problem
    holds("block_attention", arrays, block=block)
    holds("block_attention", arrays, block=block, fuse="exact")
    holds("two_level_attention", arrays, block=block, pool=pool)


@FEW
@given(problems(square=True), st.floats(0, 1), st.booleans())
def test_gates(problem, density, shared):
    arrays, rng = problem
    lead = () if shared else arrays[0].shape[:-2]
    gate = rng.random((*lead, arrays[0].shape[-2], 1)).astype(arrays[0].dtype)
    gate[rng.random(gate.shape) < density] = 0
    holds("gated_attention", arrays, gate=gate, causal=True)
    y = refattn.gated_attention(*arrays[:3], gate=gate, causal=True, backend="numba")
    assert (y[np.broadcast_to(gate == 0, y.shape)] == 0).all()


@pytest.mark.parametrize(
    "attention",
    [
        ("local_attention", {"window": 9}),
        ("local_attention", {"window": 9, "dilation": 3}),
        ("sparse_attention", {"mask": refattn.masks.strided(120, 7)}),
        ("linear_attention", {"causal": True}),
        ("linear_attention_chunked", {"chunk": 16}),
        ("performer_attention", {"omega": refattn.random_features(16, 8, rng=0), "causal": True}),
        ("block_attention", {"block": 25}),
        ("two_level_attention", {"block": 25}),
        ("linformer_attention", {"E": np.random.default_rng(0).standard_normal((9, 120))}),
    ],
    ids=lambda pair: pair[0],
)
def test_gates_on_every_attention(attention):
    name, options = attention
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, 120, 8)) for _ in range(4)]
    gate = (rng.random((120, 1)) < 0.4).astype(float)
    inner = getattr(refattn, name)
    holds("gated_attention", arrays, gate=gate, attention=inner, **options)
    whole = inner(*arrays[:3], backend="numba", **options)
    gated = refattn.gated_attention(
        *arrays[:3], gate=gate, attention=inner, backend="numba", **options
    )
    np.testing.assert_allclose(gated, gate * whole, atol=1e-12)
