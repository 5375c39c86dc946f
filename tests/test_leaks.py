"""Nothing leaks: NaN in what a query may not see, forward and backward, and the future."""

import numpy as np
import pytest

import refattn
from cases import MECHANISMS, Shape, cases

SHAPES = [(7, 7, 4, 5), (5, 9, 3, 1), (9, 5, 1, 2)]
POSITIVE = [case for case in cases(SHAPES) if case.label not in case.mechanism.signed]
CAUSAL = [case for case in cases([(9, 9, 4, 5)]) if case.build()[3].get("causal")]


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("case", cases(SHAPES), ids=str)
def test_a_poisoned_key_reaches_only_the_queries_that_see_it(case, poison):
    q, k, v, options = case.build()
    sees = case.sees(options)
    clean = case.mechanism.attention(q, k, v, **options)
    dy = np.random.default_rng(1).standard_normal(clean.shape)
    clean_dq = case.mechanism.vjp(dy, q, k, v, **options)[0]
    for j in range(len(k)):
        bad_k, bad_v = k.copy(), v.copy()
        bad_k[j], bad_v[j] = poison, poison
        with np.errstate(invalid="ignore"):  # the queries that do see it
            y = case.mechanism.attention(q, bad_k, bad_v, **options)
            dq = case.mechanism.vjp(dy, q, bad_k, bad_v, **options)[0]
        blind = np.flatnonzero(~sees[:, j])
        np.testing.assert_allclose(y[blind], clean[blind], rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(dq[blind], clean_dq[blind], rtol=1e-12, atol=1e-14)
        if np.isnan(poison):
            assert not np.isfinite(y[sees[: len(y), j]]).any()


@pytest.mark.parametrize("case", cases(SHAPES), ids=str)
def test_a_poisoned_query_reaches_only_the_gradients_of_keys_that_it_sees(case):
    q, k, v, options = case.build()
    sees = case.sees(options)
    y = case.mechanism.attention(q, k, v, **options)
    if len(y) != len(q):
        return  # fused blocks: an output row has no query of its own
    dy = np.random.default_rng(3).standard_normal(y.shape)
    clean = case.mechanism.vjp(dy, q, k, v, **options)
    for i in range(len(q)):
        bad = q.copy()
        bad[i] = np.nan
        grads = case.mechanism.vjp(dy, bad, k, v, **options)
        others = np.arange(len(q)) != i
        np.testing.assert_allclose(grads[0][others], clean[0][others], rtol=1e-12, atol=1e-14)
        for g, c in zip(grads[1:3], clean[1:3], strict=True):
            np.testing.assert_allclose(g[~sees[i]], c[~sees[i]], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", POSITIVE, ids=str)
def test_a_poisoned_value_is_not_hidden(case):
    """With the key intact, an infinite value gives an infinite output where it has weight."""
    q, k, v, options = case.build()
    sees = case.sees(options)
    for j in range(len(k)):
        bad = v.copy()
        bad[j, 0] = np.inf
        y = case.mechanism.attention(q, k, bad, **options)
        np.testing.assert_array_equal(np.isposinf(y[:, 0]), sees[: len(y), j])
        assert np.isfinite(y[:, 1:]).all()


@pytest.mark.parametrize("mechanism", [m for m in MECHANISMS.values() if m.dead], ids=str)
def test_keys_that_nobody_sees_and_queries_that_see_nothing(mechanism):
    """Their NaN reaches no gradient at all, and their own gradient is zero."""
    shape = Shape(6, 8, 3, 2)
    rng = np.random.default_rng(2)
    q, k, v, dy = (rng.standard_normal((2, *s)) for s in ((6, 3), (8, 3), (8, 2), (6, 2)))
    options, dead_q, dead_k = mechanism.dead(shape, rng)
    clean = mechanism.vjp(dy, q, k, v, **options)
    bad_q, bad_k, bad_v, bad_dy = q.copy(), k.copy(), v.copy(), dy.copy()
    bad_q[:, dead_q], bad_dy[:, dead_q] = np.nan, np.nan
    bad_k[:, dead_k], bad_v[:, dead_k] = np.nan, np.inf
    grads = mechanism.vjp(bad_dy, bad_q, bad_k, bad_v, **options)
    for g, c in zip(grads, clean, strict=True):
        np.testing.assert_allclose(g, c, rtol=1e-12, atol=1e-14)
    assert not grads[0][:, dead_q].any() and not grads[1][:, dead_k].any()
    assert not grads[2][:, dead_k].any()


def test_an_empty_row_has_output_zero_lse_minus_infinity_gradient_zero():
    q, k, v = np.ones((3, 2)), np.ones((4, 2)), np.ones((4, 2))
    mask = np.ones((3, 4), bool)
    mask[1] = False
    y, lse = refattn.softmax_attention(q, k, v, mask=mask, return_lse=True)
    assert not y[1].any() and lse[1] == -np.inf and np.isfinite(lse[[0, 2]]).all()
    dq, *_ = refattn.softmax_attention_vjp(y, q, k, v, mask=mask, dlse=lse)
    assert not dq[1].any()


def test_huge_numbers_that_nobody_sees_raise_no_warning():
    """Their scores overflow before they are hidden; the suite turns warnings into errors."""
    q, k, v = np.full((3, 4, 2), 1e200)
    mask = np.ones((4, 4), bool)
    mask[:, 2] = False
    q[:], k[[0, 1, 3]], v[[0, 1, 3]] = 1.0, 1.0, 1.0
    for hidden in (1e308, np.inf, np.nan):
        k[2], v[2] = hidden, hidden
        assert (refattn.softmax_attention(q, k, v, mask=mask) == 1).all()
        grads = refattn.softmax_attention_vjp(q, q, k, v, mask=mask)
        assert all(np.isfinite(g).all() for g in grads)


def test_scores_that_overflow_to_minus_infinity_hide_a_key():
    """Dense and sparse forms agree that such a row has nothing to attend."""
    q, k, v = np.full((1, 1), 1e20, np.float32), np.full((2, 1), -1e20, np.float32), np.ones((2, 1))
    v = v.astype(np.float32)
    full = refattn.masks.local(1, 5, m=2)
    assert refattn.softmax_attention(q, k, v) == 0
    assert refattn.local_attention(q, k, v, window=5) == 0
    assert refattn.sparse_attention(q, k, v, mask=full) == 0


def test_a_visible_bias_of_nan_is_seen():
    x = np.ones((3, 2))
    bias = np.zeros((3, 3))
    bias[1, 2] = np.nan
    y = refattn.softmax_attention(x, x, x, bias=bias)
    assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()


def test_merging_ignores_parts_that_saw_nothing():
    y, lse = refattn.merge_attention([[[1.0]], [[np.nan]]], [[0.5], [-np.inf]])
    assert y == 1 and lse == 0.5
    y, lse = refattn.merge_attention([[[np.nan]], [[np.nan]]], [[-np.inf], [-np.inf]])
    assert y == 0 and lse == -np.inf
    y, lse = refattn.merge_attention([[[1.0]], [[np.inf]]], [[0.5], [-np.inf]])
    assert y == 1 and lse == 0.5
    # a part that did see something is not dropped, however small its weight
    y, lse = refattn.merge_attention([[[1.0]], [[np.nan]]], [[0.0], [-1e4]])
    assert np.isnan(y)


@pytest.mark.parametrize("amount", [1.0, 1e5, np.nan])
@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_the_future_changes_nothing(case, amount):
    q, k, v, options = case.build()
    y = case.mechanism.attention(q, k, v, **options)
    for i in range(len(q)):
        later_k, later_v = k.copy(), v.copy()
        later_k[i + 1 :] += amount
        later_v[i + 1 :] += amount
        with np.errstate(over="ignore", invalid="ignore"):  # in the rows that see the change
            again = case.mechanism.attention(q, later_k, later_v, **options)
        np.testing.assert_allclose(again[: i + 1], y[: i + 1], rtol=1e-13, atol=1e-15)
