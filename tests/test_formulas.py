"""Each formula agrees with its definition, in every dtype, at extreme logits, in every layout."""

import ml_dtypes
import numpy as np
import pytest

import refattn
from cases import LONG, MECHANISMS, SHAPES, Case, cases, flat, options_in
from cases import softmax_tolerance as tolerance
from definitions.softmax import softmax_attention as softmax_definition
from numbers_of import exact, loops

EPS = float(np.finfo(float).eps)
SOFTMAX = MECHANISMS["softmax_attention"]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_float64_against_forty_digits(case):
    q, k, v, options = case.build()
    y = case.mechanism.attention(q, k, v, **options)
    truth = exact(case.mechanism.definition, q, k, v, options)
    assert y.dtype == np.float64 and y.shape == truth.shape
    assert abs(y - truth).max(initial=0) <= case.tolerance(q, k, v, options)


@pytest.mark.parametrize("case", cases([(7, 7, 4, 5)], scale=1e4), ids=str)
def test_extreme_logits(case):
    q, k, v, options = case.build()
    y = case.mechanism.attention(q, k, v, **options)
    truth = exact(case.mechanism.definition, q, k, v, options)
    assert abs(y - truth).max() <= case.tolerance(q, k, v, options)


@pytest.mark.parametrize("case", cases(LONG), ids=str)
def test_more_than_one_block(case):
    q, k, v, options = case.build()
    y = case.mechanism.attention(q, k, v, **options)
    truth = loops(case.mechanism.definition, q, k, v, options)
    assert abs(y - truth).max() <= 2 * case.tolerance(q, k, v, options)


@pytest.mark.parametrize("case", cases([(7, 7, 4, 5), (5, 9, 3, 1)]), ids=str)
def test_float32_against_forty_digits(case):
    q, k, v, options = case.build()
    q, k, v, options = *(x.astype(np.float32) for x in (q, k, v)), options_in(options, np.float32)
    y = case.mechanism.attention(q, k, v, **options)
    assert y.dtype == np.float32
    wide = [x.astype(np.float64) for x in (q, k, v)]
    truth = exact(case.mechanism.definition, *wide, options_in(options, np.float64))
    assert abs(y - truth).max() <= case.tolerance(*wide, options, np.float32)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("case", cases([(7, 7, 4, 5)]), ids=str)
def test_half_types_are_computed_in_float32_and_rounded_once(case, dtype):
    q, k, v, options = case.build()
    low = [x.astype(dtype) for x in (q, k, v)]
    options = options_in(options, dtype)
    y = case.mechanism.attention(*low, **options)
    single = [x.astype(np.float32) for x in low]
    wide = case.mechanism.attention(*single, **options_in(options, np.float32))
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, wide.astype(dtype))
    grads = case.mechanism.vjp(y, *low, **options)
    wide = case.mechanism.vjp(y.astype(np.float32), *single, **options_in(options, np.float32))
    assert all(g.dtype == dtype for g in grads if not isinstance(g, tuple))
    for g, w in zip(flat(grads), flat(wide), strict=True):  # a state stays in float32
        np.testing.assert_array_equal(g, w.astype(g.dtype))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_log_sum_exp(shape, dtype):
    for label in SOFTMAX.options:
        case = Case(SOFTMAX, label, shape)
        q, k, v, options = case.build()
        q, k, v, options = *(x.astype(dtype) for x in (q, k, v)), options_in(options, dtype)
        y, lse = refattn.softmax_attention(q, k, v, **options, return_lse=True)
        wide = [x.astype(np.float64) for x in (q, k, v)]
        options = options_in(options, np.float64)
        _, truth = exact(softmax_definition, *wide, {**options, "return_lse": True})
        assert lse.dtype == dtype and lse.shape == (len(q),)
        np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(truth))
        seen = np.isfinite(truth)
        error = abs(lse[seen] - truth[seen]).max(initial=0)
        assert error <= tolerance(q, k, np.ones((1, 1)), options, float(np.finfo(dtype).eps))


@pytest.mark.parametrize("case", cases([(6, 6, 3, 2)]), ids=str)
def test_leading_axes_broadcast(case):
    """Grouped queries: q (2, 3, 2, n, d) against k and v (2, 3, 1, m, .), each head on its own."""
    q, k, v, options = case.build(2, 3, 2)
    k, v = k[:, :, :1], v[0, :, :1]
    y = case.mechanism.attention(q, k, v, **options)
    assert y.shape[:3] == (2, 3, 2)
    for at in np.ndindex(2, 3, 2):
        one = case.mechanism.attention(q[at], k[at[0], at[1], 0], v[at[1], 0], **options)
        assert y[at].shape == one.shape
        assert abs(y[at] - one).max() <= 2 * case.tolerance(q, k, v, options)


def test_mask_and_bias_broadcast_over_leading_axes():
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal((2, 3, 5, 4)) for _ in range(3))
    mask, bias = rng.random((2, 1, 1, 5)) < 0.6, rng.standard_normal((3, 5, 1))
    y, lse = refattn.softmax_attention(q, k, v, mask=mask, bias=bias, return_lse=True)
    for b, h in np.ndindex(2, 3):
        full = {
            "mask": np.tile(mask[b, 0], (5, 1)),
            "bias": np.tile(bias[h], (1, 5)),
            "return_lse": True,
        }
        truth, truth_lse = exact(softmax_definition, q[b, h], k[b, h], v[b, h], full)
        assert abs(y[b, h] - truth).max() <= tolerance(q, k, v, {"bias": bias}, EPS)
        np.testing.assert_allclose(lse[b, h], truth_lse, rtol=1e-13)


@pytest.mark.parametrize("case", cases([(0, 4, 3, 5), (4, 0, 3, 5), (0, 0, 3, 5)]), ids=str)
def test_no_queries_or_no_keys(case):
    q, k, v, options = case.build(2)
    y = case.mechanism.attention(q, k, v, **options)
    assert y.shape[0] == 2 and y.shape[-1] == 5
    assert not y.any() or "initial_state" in options
    grads = case.mechanism.vjp(y, q, k, v, **options)
    assert [g.shape for g in grads[:3]] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("case", cases([(6, 6, 3, 2)]), ids=str)
def test_empty_batch(case):
    q, k, v, options = case.build(0)
    y = case.mechanism.attention(q, k, v, **options)
    assert y.shape[0] == 0 and y.ndim == 3
    grads = case.mechanism.vjp(y, q, k, v, **options)
    assert [g.shape for g in grads[:3]] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("case", cases([(7, 7, 4, 5)]), ids=str)
def test_strided_and_read_only_inputs(case):
    q, k, v, options = case.build()
    y = case.mechanism.attention(q, k, v, **options)
    reversed_, columns = q[::-1].copy()[::-1], np.asfortranarray(k)
    gaps = np.repeat(v, 2, axis=0)[::2]
    for x in (reversed_, columns, gaps):
        x.setflags(write=False)
    same = case.mechanism.attention(reversed_, columns, gaps, **options)
    assert abs(y - same).max() <= 2 * case.tolerance(q, k, v, options)


def test_attention_matrix_gives_the_weights():
    rng = np.random.default_rng(6)
    q, k, v = (rng.standard_normal((2, 8, 3)) for _ in range(3))
    a = refattn.attention_matrix(refattn.local_attention, q, k, window=1)
    assert a.shape == (2, 8, 8)
    np.testing.assert_allclose(a.sum(axis=-1), 1, rtol=1e-14)
    y = refattn.local_attention(q, k, v, window=1)
    assert abs(a @ v - y).max() <= 2 * tolerance(q, k, v, {}, EPS)


def test_the_log_sum_exp_has_every_leading_axis():
    """v may have leading axes that q and k lack; y has them, and so has lse."""
    q, k, v = np.ones((4, 3)), np.ones((6, 3)), np.ones((2, 6, 5))
    y, lse = refattn.softmax_attention(q, k, v, return_lse=True)
    assert y.shape == (2, 4, 5) and lse.shape == (2, 4) and lse.flags.writeable


def test_the_bias_is_rounded_to_the_dtype_of_q():
    q, k, v = np.random.default_rng(7).standard_normal((3, 5, 4)).astype(np.float16)
    bias = np.random.default_rng(8).standard_normal((5, 5))
    y = refattn.softmax_attention(q, k, v, bias=bias)
    z = refattn.softmax_attention(q, k, v, bias=bias.astype(np.float16))
    np.testing.assert_array_equal(y, z)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_attention_matrix_keeps_the_dtype(dtype):
    q, k = np.ones((2, 3), dtype), np.ones((4, 3), dtype)
    a = refattn.attention_matrix(refattn.softmax_attention, q, k)
    assert a.dtype == dtype and a.shape == (2, 4) and (a == 0.25).all()


def test_windows_of_any_size_are_clamped():
    """left + i must not overflow the integers that positions are held in."""
    rng = np.random.default_rng(9)
    q, k, v = rng.standard_normal((3, 9, 4))
    full = refattn.softmax_attention(q, k, v)
    for huge in (10**18, 2**63 - 1, 2**63, 10**30):
        y = refattn.local_attention(q, k, v, window=huge)
        np.testing.assert_allclose(y, full, rtol=1e-13)
        assert refattn.masks.local(9, huge).nnz == 81
        y = refattn.local_attention(q, k, v, window=1, dilation=huge)
        np.testing.assert_allclose(y, v, rtol=1e-13)
        assert refattn.local_attention_cost(9, 9, 4, 4, window=1, dilation=huge).flops == 9 * 22
        for mask in (
            refattn.masks.strided(9, huge),
            refattn.masks.fixed(9, huge, summary=huge),
            refattn.masks.block_diagonal(9, huge),
            refattn.masks.block_causal(9, huge),
            refattn.masks.hierarchical(9, huge),
        ):
            assert mask.nnz == 81
