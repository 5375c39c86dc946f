"""What holds for every input: symmetries, bounds, and forms that must coincide."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refattn
from cases import cases, softmax_tolerance

sizes = st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 6), st.integers(1, 4))
seeds = st.integers(0, 2**32 - 1)
LINEAR = [
    case
    for case in cases([(7, 7, 4, 5), (5, 9, 3, 1)])
    if case.label not in case.mechanism.nonlinear
]


def tolerance(q, k, v, options):
    return softmax_tolerance(q, k, v, options, float(np.finfo(float).eps))


def draw(size, seed, spread=1.0):
    n, m, d, e = size
    rng = np.random.default_rng(seed)
    return [
        spread * rng.standard_normal((n, d)),
        rng.standard_normal((m, d)),
        rng.standard_normal((m, e)),
    ]


@given(size=sizes, seed=seeds, spread=st.sampled_from([0.1, 1.0, 1e4]))
def test_rows_are_convex_combinations(size, seed, spread):
    q, k, v = draw(size, seed, spread)
    slack = size[1] * 4 * np.finfo(float).eps * abs(v).max()
    for y in (
        refattn.softmax_attention(q, k, v),
        refattn.local_attention(q, k, v, window=sum(size)),
        refattn.sparse_attention(q, k, v, mask=refattn.masks.local(*size[:1], 40, m=size[1])),
    ):
        assert (y >= v.min(axis=0) - slack).all() and (y <= v.max(axis=0) + slack).all()


@given(size=sizes, seed=seeds)
def test_keys_may_be_shuffled_and_queries_are_independent(size, seed):
    q, k, v = draw(size, seed)
    rng = np.random.default_rng(seed)
    bias = rng.standard_normal((size[0], size[1]))
    keys, rows = rng.permutation(size[1]), rng.permutation(size[0])
    y = refattn.softmax_attention(q, k, v, bias=bias)
    shuffled = refattn.softmax_attention(q[rows], k[keys], v[keys], bias=bias[rows][:, keys])
    assert abs(shuffled - y[rows]).max() <= 2 * tolerance(q, k, v, {"bias": bias})


@given(size=sizes, seed=seeds, shift=st.floats(-1e3, 1e3))
def test_a_constant_added_to_a_row_of_scores_changes_nothing(size, seed, shift):
    q, k, v = draw(size, seed)
    y, lse = refattn.softmax_attention(q, k, v, return_lse=True)
    bias = np.full((size[0], 1), shift)
    z, moved = refattn.softmax_attention(q, k, v, bias=bias, return_lse=True)
    assert abs(y - z).max() <= 2 * tolerance(q, k, v, {"bias": bias})
    np.testing.assert_allclose(moved, lse + shift, rtol=1e-12, atol=1e-12 * (1 + abs(shift)))


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_in_the_values(case):
    q, k, v, options = case.build()
    other = np.random.default_rng(9).standard_normal(v.shape)
    y, z = (case.mechanism.attention(q, k, x, **options) for x in (v, other))
    both = case.mechanism.attention(q, k, 2 * v - 3 * other, **options)
    error = 6 * case.tolerance(q, k, abs(v) + abs(other), options)
    assert abs(both - (2 * y - 3 * z)).max() <= error


@given(size=sizes, seed=seeds, causal=st.booleans(), dilation=st.integers(1, 3))
def test_a_window_is_its_mask(size, seed, causal, dilation):
    q, k, v = draw(size, seed)
    n, m, *_ = size
    window = tuple(np.random.default_rng(seed).integers(0, 6, 2).tolist())
    options = {"window": window, "causal": causal, "dilation": dilation}
    y = refattn.local_attention(q, k, v, **options)
    mask = refattn.masks.local(n, m=m, **options)
    assert abs(y - refattn.sparse_attention(q, k, v, mask=mask)).max() <= 2 * tolerance(q, k, v, {})
    dense = refattn.softmax_attention(q, k, v, mask=mask.toarray())
    assert abs(y - dense).max() <= 2 * tolerance(q, k, v, {})


@given(size=sizes, seed=seeds, causal=st.booleans())
def test_a_window_of_everything_is_full_attention(size, seed, causal):
    q, k, v = draw(size, seed)
    y = refattn.local_attention(q, k, v, window=sum(size), causal=causal)
    full = refattn.softmax_attention(q, k, v, causal=causal)
    assert abs(y - full).max() <= 2 * tolerance(q, k, v, {})


@given(n=st.integers(1, 20), seed=seeds, causal=st.booleans())
def test_a_hierarchy_of_one_block_is_full_attention(n, seed, causal):
    q, k, v = draw((n, n, 3, 2), seed)
    mask = refattn.masks.hierarchical(n, max(2, n), causal=causal)
    y = refattn.sparse_attention(q, k, v, mask=mask)
    full = refattn.softmax_attention(q, k, v, causal=causal)
    assert abs(y - full).max() <= 2 * tolerance(q, k, v, {})


@given(size=sizes, seed=seeds, spread=st.sampled_from([1.0, 1e4]), data=st.data())
def test_any_split_of_the_keys_merges_to_the_whole(size, seed, spread, data):
    q, k, v = draw(size, seed, spread)
    m = size[1]
    cuts = sorted(data.draw(st.lists(st.integers(0, m), max_size=4)))
    parts = list(zip([0, *cuts], [*cuts, m], strict=True))
    done = [refattn.softmax_attention(q, k[a:b], v[a:b], return_lse=True) for a, b in parts]
    ys, lses = zip(*done, strict=True)
    y, lse = refattn.merge_attention(ys, lses)
    whole, whole_lse = refattn.softmax_attention(q, k, v, return_lse=True)
    assert abs(y - whole).max() <= 4 * tolerance(q, k, v, {})
    np.testing.assert_allclose(lse, whole_lse, rtol=1e-13, atol=1e-12)
    # associative: fuse the first parts, then the rest
    first = refattn.merge_attention(ys[:1], lses[:1])
    nested = refattn.merge_attention([first[0], *ys[1:]], [first[1], *lses[1:]])
    assert abs(nested[0] - y).max() <= 4 * tolerance(q, k, v, {})


def test_merging_keeps_the_dtype_of_the_outputs():
    ys, lses = np.ones((2, 3, 4), np.float16), np.zeros((2, 3), np.float32)
    y, lse = refattn.merge_attention(ys, lses)
    assert y.dtype == np.float16 and lse.dtype == np.float32
    np.testing.assert_allclose(lse, np.log(2), rtol=1e-6)
    _, lse = refattn.merge_attention(ys, np.array([[1e-9] * 3, [0.0] * 3]))
    assert lse.dtype == np.float64 and (lse != np.log(2)).all()  # computed in the wider of the two


@pytest.mark.parametrize("case", cases([(7, 7, 4, 5)]), ids=str)
def test_the_batch_does_not_matter(case):
    """Each head's answer is the same alone and in company."""
    q, k, v, options = case.build(4)
    together = case.mechanism.attention(q, k, v, **options)
    for h in range(4):
        alone = case.mechanism.attention(q[h], k[h], v[h], **options)
        assert abs(alone - together[h]).max() <= 2 * case.tolerance(q, k, v, options)
