"""Compiled kernels agree with the formulas: the same cases, the tolerance rule of the grader."""

import inspect

import numpy as np
import pytest

import refattn
from cases import LONG, MECHANISMS, SHAPES, Shape, cases, flat, options_in
from refattn.verify.cases import Trial
from refattn.verify.wanted import wanted_of

BACKENDS = ["numba"]
DTYPES = [np.float64, np.float32]


class Reference:
    """A mechanism as ``wanted_of`` wants it."""

    def __init__(self, mechanism):
        self.mechanism = mechanism.name
        self.forward, self.vjp = mechanism.attention, mechanism.vjp


def agrees(case, dtype, backend):
    """Forward and gradient within the budget of the grader; fused blocks are held by eps alone."""
    q, k, v, options = case.build()
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    low, wide = options_in(options, dtype), options_in(options, np.float64)
    kept = [x.copy() for x in (q, k, v)]
    y = case.mechanism.attention(q, k, v, backend=backend, **low)
    dy = np.random.default_rng(7).standard_normal(y.shape).astype(dtype)
    trial = Trial(str(case), q, k, v, dy)
    wanted = wanted_of(Reference(case.mechanism), trial, low, wide, gradients=True)
    grads = case.mechanism.vjp(dy, q, k, v, backend=backend, **low)
    plain = case.mechanism.vjp(dy, q, k, v, **low)
    assert len(flat(grads)) == len(flat(plain))
    for g, p in zip(flat(grads), flat(plain), strict=True):
        assert g.dtype == p.dtype and g.shape == p.shape
    answers = {"y": y, **dict(zip(("dq", "dk", "dv"), grads, strict=False))}
    for name, x in answers.items():
        want = wanted[name]
        assert x.dtype == dtype and x.shape == want.value.shape, name
        gap = abs(x.astype(float) - want.value).max(initial=0)
        limit = want.budget
        if case.label in case.mechanism.signed:  # denominators may nearly vanish
            size = abs(want.value).max(initial=0)
            limit = 4 * limit + 32 * np.finfo(dtype).eps * want.conditioning * size
        assert gap <= limit, (name, gap, limit)
    exact = case.mechanism.vjp(*(x.astype(float) for x in (dy, q, k, v)), **wide)
    for g, p, x in zip(flat(grads)[3:], flat(plain)[3:], flat(exact)[3:], strict=True):
        own = abs(p.astype(float) - x).max(initial=0)
        size = abs(x).max(initial=0) + 1
        assert abs(g.astype(float) - x).max(initial=0) <= 4 * own + 64 * np.finfo(dtype).eps * size
    for x, before in zip((q, k, v), kept, strict=True):
        np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases(SHAPES), ids=str)
def test_forward_and_gradient(case, backend, dtype):
    agrees(case, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases(LONG), ids=str)
def test_more_than_one_tile(case, backend, dtype):
    agrees(case, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases([(7, 7, 4, 5)], scale=1e4), ids=str)
def test_extreme_logits(case, backend):
    """Where a softmax is all or nothing: the formula's bound, which grows with the logits."""
    q, k, v, options = case.build()
    y = case.mechanism.attention(q, k, v, backend=backend, **options)
    truth = case.mechanism.attention(q, k, v, **options)
    assert abs(y - truth).max() <= 2 * case.tolerance(q, k, v, options)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases([(7, 7, 4, 5), (9, 5, 1, 2)]), ids=str)
def test_a_poisoned_key_reaches_only_the_queries_that_see_it(case, backend, poison):
    q, k, v, options = case.build()
    sees = case.sees(options)
    clean = case.mechanism.attention(q, k, v, backend=backend, **options)
    dy = np.random.default_rng(1).standard_normal(clean.shape)
    clean_dq = case.mechanism.vjp(dy, q, k, v, backend=backend, **options)[0]
    for j in (0, len(k) // 2, len(k) - 1):
        bad_k, bad_v = k.copy(), v.copy()
        bad_k[j], bad_v[j] = poison, poison
        with np.errstate(all="ignore"):
            y = case.mechanism.attention(q, bad_k, bad_v, backend=backend, **options)
            dq = case.mechanism.vjp(dy, q, bad_k, bad_v, backend=backend, **options)[0]
        blind = np.flatnonzero(~sees[:, j])
        np.testing.assert_allclose(y[blind], clean[blind], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(dq[blind], clean_dq[blind], rtol=1e-11, atol=1e-13)
        if np.isnan(poison):
            assert not np.isfinite(y[sees[: len(y), j]]).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases([(7, 7, 4, 5)]), ids=str)
def test_a_poisoned_query_reaches_only_the_keys_that_it_sees(case, backend):
    q, k, v, options = case.build()
    sees = case.sees(options)
    y = case.mechanism.attention(q, k, v, backend=backend, **options)
    if len(y) != len(q):
        return  # fused blocks: an output row has no query of its own
    dy = np.random.default_rng(3).standard_normal(y.shape)
    clean = case.mechanism.vjp(dy, q, k, v, backend=backend, **options)
    for i in (0, len(q) - 1):
        bad = q.copy()
        bad[i] = np.nan
        with np.errstate(all="ignore"):
            grads = case.mechanism.vjp(dy, bad, k, v, backend=backend, **options)
        others = np.arange(len(q)) != i
        np.testing.assert_allclose(grads[0][others], clean[0][others], rtol=1e-11, atol=1e-13)
        for g, c in zip(grads[1:3], clean[1:3], strict=True):
            np.testing.assert_allclose(g[~sees[i]], c[~sees[i]], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MECHANISMS)
def test_no_queries_no_keys_no_heads(name, backend, shape):
    """As the formula: its shapes, or its refusal."""
    n, m = shape
    mechanism = MECHANISMS[name]
    for label, make in mechanism.options.items():
        for lead in ((), (0,), (2, 0)):
            arrays = [np.ones((*lead, *s)) for s in ((n, 3), (m, 3), (m, 2))]
            outcomes = []
            for where in ("numpy", backend):
                try:
                    given = make(Shape(max(n, 1), max(m, 1), 3, 2), np.random.default_rng(0))
                    y = mechanism.attention(*arrays, backend=where, **given)
                    grads = flat(mechanism.vjp(y, *arrays, backend=where, **given))
                    outcomes.append([x.shape for x in (y, *grads)])
                except ValueError as error:
                    outcomes.append(str(error))
            assert outcomes[0] == outcomes[1], (label, lead)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MECHANISMS)
def test_bad_input_is_refused_in_the_same_words(name, backend):
    x, y = np.ones((4, 3)), np.ones((4, 2))
    mechanism = MECHANISMS[name]
    label = next(iter(mechanism.options))
    good = mechanism.options[label](Shape(4, 4, 3, 2), np.random.default_rng(0))
    bad = [
        ((np.ones(3), x, y), {}),
        ((x, np.ones((4, 2)), y), {}),
        ((x, x, np.ones((5, 2))), {}),
        ((x.astype(int), x, y), {}),
        ((x, x.astype(np.float32), y), {}),
        ((np.ones((2, 4, 3)), np.ones((3, 4, 3)), y), {}),
        ((x, x, y), {"scale": np.nan}),
        ((x, x, y), {"window": -1}),
        ((x, x, y), {"mask": np.ones((3, 3))}),
        ((x, x, y), {"bias": np.ones((3, 3))}),
        ((x, x, y), {"block": 0}),
        ((x, x, y), {"feature_map": "cosh"}),
        ((x, x, y), {"causal": 1}),
        ((x, x, y), {"chunk": 0}),
        ((x, x, y), {"softcap": -1.0}),
        ((x, x, y), {"no_such_option": 1}),
    ]
    taken = inspect.signature(mechanism.attention).parameters
    for arrays, more in bad:
        if more and not set(more) & set(taken) and "no_such_option" not in more:
            continue
        for run, first in ((mechanism.attention, ()), (mechanism.vjp, (y,))):
            errors = []
            for where in ("numpy", backend):
                with pytest.raises((TypeError, ValueError)) as caught:
                    run(*first, *arrays, backend=where, **{**good, **more})
                errors.append((caught.type, str(caught.value)))
            if "no_such_option" not in more:
                assert errors[0] == errors[1]


@pytest.mark.parametrize("backend", ["numpy", *BACKENDS])
def test_what_a_forward_pass_saved(backend):
    rng = np.random.default_rng(0)
    q, k, v, dy = (rng.standard_normal((2, 70, 8)).astype(np.float32) for _ in range(4))
    options = {"causal": True, "backend": backend}
    saved = refattn.softmax_attention(q, k, v, return_lse=True, **options)
    again = refattn.softmax_attention_vjp(dy, q, k, v, saved=saved, **options)
    for a, b in zip(again, refattn.softmax_attention_vjp(dy, q, k, v, **options), strict=True):
        np.testing.assert_array_equal(a, b)
    for wrong in (saved[0], (saved[0], saved[0]), saved[:1], (saved[1], saved[1])):
        with pytest.raises((TypeError, ValueError), match="saved"):
            refattn.softmax_attention_vjp(dy, q, k, v, saved=wrong, **options)


def test_a_kernel_that_is_missing_is_named(monkeypatch):
    import refattn.softmax.cpu

    monkeypatch.delattr(refattn.softmax.cpu, "softmax_attention")
    with pytest.raises(refattn.BackendUnavailable, match="softmax_attention has no 'numba' kernel"):
        refattn.softmax_attention(*np.ones((3, 2, 2)), backend="numba")
