"""Each mask against its definition pair by pair, and its row counts against closed forms."""

import math
import tracemalloc

import numpy as np
import pytest
import scipy
from hypothesis import given
from hypothesis import strategies as st

import refattn
from definitions import softmax, sparse
from refattn import masks

SIZES = [0, 1, 2, 5, 12, 27, 40]


def dense(n, m, sees):
    return np.array([[sees(i, j) for j in range(m)] for i in range(n)], bool).reshape(n, m)


def local(i, j, n, **window):
    return sparse.window_sees(i, j, n, n, **window)


DEFINED = {
    "local": (lambda n: masks.local(n, 3), lambda i, j, n: local(i, j, n, window=3)),
    "local-causal": (
        lambda n: masks.local(n, (2, 4), causal=True),
        lambda i, j, n: local(i, j, n, window=(2, 0)),
    ),
    "dilated": (
        lambda n: masks.dilated(n, (2, 1), 3),
        lambda i, j, n: local(i, j, n, window=(2, 1), dilation=3),
    ),
    "causal": (masks.causal, lambda i, j, n: softmax.causal_sees(i, j, n, n)),
    "strided": (
        lambda n: masks.strided(n, 4),
        lambda i, j, n: sparse.strided_sees(i, j, 4, False),
    ),
    "strided-causal": (
        lambda n: masks.strided(n, 4, causal=True),
        lambda i, j, n: sparse.strided_sees(i, j, 4, True),
    ),
    "fixed": (
        lambda n: masks.fixed(n, 5, summary=2),
        lambda i, j, n: sparse.fixed_sees(i, j, 5, 2, False),
    ),
    "fixed-causal": (
        lambda n: masks.fixed(n, 4, causal=True),
        lambda i, j, n: sparse.fixed_sees(i, j, 4, 1, True),
    ),
    "global": (
        lambda n: masks.global_tokens(n, range(0, n, 4)),
        lambda i, j, n: i % 4 == 0 or j % 4 == 0,
    ),
    "block_diagonal": (lambda n: masks.block_diagonal(n, 4), lambda i, j, n: i // 4 == j // 4),
    "block_causal": (lambda n: masks.block_causal(n, 4), lambda i, j, n: j // 4 <= i // 4),
    "hierarchical": (
        lambda n: masks.hierarchical(n, 3),
        lambda i, j, n: sparse.hierarchical_sees(i, j, n, 3),
    ),
    "hierarchical-causal": (
        lambda n: masks.hierarchical(n, 2, causal=True),
        lambda i, j, n: sparse.hierarchical_sees(i, j, n, 2) and j <= i,
    ),
    "longformer": (
        lambda n: masks.longformer(n, 1, range(0, n, 6), dilation=2),
        lambda i, j, n: local(i, j, n, window=1, dilation=2) or i % 6 == 0 or j % 6 == 0,
    ),
    "bigbird": (
        lambda n: masks.bigbird(n, 3, global_blocks=min(1, -(-n // 3)), random_blocks=0, rng=0),
        lambda i, j, n: abs(i // 3 - j // 3) <= 1 or i < 3 or j < 3,
    ),
}


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", DEFINED)
def test_pair_by_pair(name, n):
    build, sees = DEFINED[name]
    mask = build(n)
    np.testing.assert_array_equal(mask.toarray(), dense(n, n, lambda i, j: sees(i, j, n)))


@pytest.mark.parametrize("name", DEFINED)
def test_canonical_boolean_csr(name):
    mask = DEFINED[name][0](27)
    assert isinstance(mask, scipy.sparse.csr_array) and mask.dtype == bool
    assert mask.data.all() and mask.indices.dtype == np.int32
    rebuilt = scipy.sparse.csr_array((mask.data, mask.indices, mask.indptr), shape=mask.shape)
    assert rebuilt.has_canonical_format  # decided from the arrays, not from a flag


@pytest.mark.parametrize(("n", "m"), [(3, 7), (7, 3), (5, 5), (0, 3), (3, 0)])
def test_queries_and_keys_of_different_number(n, m):
    mask = masks.causal(n, m).toarray()
    np.testing.assert_array_equal(mask, dense(n, m, lambda i, j: softmax.causal_sees(i, j, n, m)))
    for options in ({"window": 1}, {"window": (2, 0), "dilation": 2}, {"window": 9}):
        sees = lambda i, j, o=options: sparse.window_sees(i, j, n, m, **o)
        np.testing.assert_array_equal(masks.local(n, m=m, **options).toarray(), dense(n, m, sees))


@pytest.mark.parametrize("name", DEFINED)
def test_sparse_dense_and_definition_agree(name):
    n = 12
    mask = DEFINED[name][0](n)
    q, k, v = np.random.default_rng(1).standard_normal((3, n, 4))
    y = refattn.sparse_attention(q, k, v, mask=mask)
    z = refattn.softmax_attention(q, k, v, mask=mask.toarray())
    loops = sparse.sparse_attention(
        q.tolist(), k.tolist(), v.tolist(), mask=mask.toarray().tolist()
    )
    np.testing.assert_allclose(y, z, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(y, loops, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("root", [2, 5, 16])
def test_strided_and_fixed_rows_grow_with_the_root_of_n(root):
    """At stride = block = sqrt(n): closed forms of each row, and at most 2 sqrt(n) in all."""
    n = root**2
    i = np.arange(n)
    strided = np.diff(masks.strided(n, root, causal=True).indptr)
    shared = 1 + (i >= root)  # the query itself, and the key one stride back
    np.testing.assert_array_equal(strided, (np.minimum(i, root) + 1) + (i // root + 1) - shared)
    assert strided.max() <= 2 * root
    fixed = np.diff(masks.fixed(n, root, causal=True).indptr)
    np.testing.assert_array_equal(fixed, i % root + 1 + i // root)
    assert fixed.max() <= 2 * root


@pytest.mark.parametrize(("b", "levels"), [(2, 1), (2, 5), (3, 3), (5, 2), (7, 1)])
def test_hierarchical_rows_of_a_whole_tree(b, levels):
    counts = np.diff(masks.hierarchical(b**levels, b).indptr)
    np.testing.assert_array_equal(counts, levels * (b - 1) + 1)


@given(n=st.integers(1, 300), b=st.integers(2, 12))
def test_hierarchical_rows_are_bounded_and_hold_the_query(n, b):
    mask = masks.hierarchical(n, b)
    levels = max(1, math.ceil(round(math.log(n, b), 9)))
    assert np.diff(mask.indptr).max() <= levels * (b - 1) + 1
    assert mask.diagonal().all()


def test_hierarchical_last_key_is_seen_by_itself_alone():
    column = masks.hierarchical(126, 5).toarray()[:, -1]
    assert column.sum() == 1 and column[-1]


def test_block_and_window_counts():
    counts = np.diff(masks.block_diagonal(10, 4).indptr)
    assert counts.tolist() == [4] * 8 + [2] * 2
    assert np.diff(masks.block_causal(10, 4).indptr).tolist() == [4] * 4 + [8] * 4 + [10] * 2
    assert set(np.diff(masks.local(30, (2, 3)).indptr)[2:-3]) == {6}


@pytest.mark.parametrize(("n", "keys", "m"), [(5, 0, 5), (9, 4, 11), (6, 6, 6), (0, 2, 3)])
def test_random_rows(n, keys, m):
    mask = masks.random(n, keys, rng=np.random.default_rng(7), m=m)
    assert (np.diff(mask.indptr) == keys).all() and mask.shape == (n, m)
    assert (mask.toarray().sum(axis=1) == keys).all()  # all different
    again = masks.random(n, keys, rng=7, m=m)
    np.testing.assert_array_equal(mask.toarray(), again.toarray())


def test_random_keys_are_uniform():
    """Each key's count over n rows is binomial: within five standard deviations of n keys / m."""
    n, keys, m = 4000, 3, 10
    counts = masks.random(n, keys, rng=1, m=m).toarray().sum(axis=0)
    sigma = math.sqrt(n * keys / m * (1 - keys / m))
    assert abs(counts - n * keys / m).max() < 5 * sigma


def test_bigbird_draws_whole_blocks():
    mask = masks.bigbird(64, 4, rng=3).toarray()
    blocks = mask.reshape(16, 4, 16, 4)
    assert (blocks.any(axis=(1, 3)) == blocks.all(axis=(1, 3))).all()
    without = masks.bigbird(64, 4, random_blocks=0, rng=3).toarray()
    extra = blocks.any(axis=(1, 3)).sum(1) - without.reshape(16, 4, 16, 4).any(axis=(1, 3)).sum(1)
    assert extra.min() >= 0 and extra.max() <= 3
    assert extra.sum() > 16  # three draws a row; few of them fall on blocks that are seen already
    three = masks.bigbird(64, 4, global_blocks=3, random_blocks=0, window=0, rng=0).toarray()
    assert three[:12].all() and three[:, :12].all() and three[12:, 12:].sum() == 13 * 16


@given(data=st.data(), n=st.integers(0, 9), m=st.integers(0, 9))
def test_union_and_intersection(data, n, m):
    parts = [
        np.array(data.draw(st.lists(st.booleans(), min_size=n * m, max_size=n * m)), bool)
        for _ in range(3)
    ]
    parts = [part.reshape(n, m) for part in parts]
    sparse = [scipy.sparse.csr_array(part) for part in parts]
    np.testing.assert_array_equal(masks.union(*sparse).toarray(), parts[0] | parts[1] | parts[2])
    both = masks.intersection(*sparse)
    np.testing.assert_array_equal(both.toarray(), parts[0] & parts[1] & parts[2])
    assert both.dtype == bool and both.format == "csr" and both.has_canonical_format


def test_stored_false_and_duplicates_count_once():
    data = np.array([True, True, False, True, True])
    messy = scipy.sparse.csr_array((data, [2, 2, 0, 1, 1], [0, 4, 5, 5]), shape=(3, 3))
    kept = messy.data.copy(), messy.indices.copy()
    clean = scipy.sparse.csr_array(np.array([[0, 1, 1], [0, 1, 0], [0, 0, 0]], bool))
    q, k, v = np.random.default_rng(2).standard_normal((3, 3, 2))
    expected = refattn.sparse_attention(q, k, v, mask=clean)
    np.testing.assert_array_equal(refattn.sparse_attention(q, k, v, mask=messy), expected)
    np.testing.assert_array_equal(masks.union(messy).toarray(), clean.toarray())
    np.testing.assert_array_equal(masks.intersection(messy, clean).toarray(), clean.toarray())
    np.testing.assert_array_equal(messy.data, kept[0])
    np.testing.assert_array_equal(messy.indices, kept[1])


def test_column_indices_out_of_range_are_refused():
    parts = np.ones(2, bool), np.array([0, -1]), np.array([0, 1, 2])
    with pytest.raises(ValueError, match="column indices outside 0 to 4"):
        masks.union(scipy.sparse.csr_array(parts, shape=(2, 5)))


def test_composition_returns_a_new_mask():
    mask = masks.causal(4)
    joined = masks.union(mask)
    joined.data[:] = False
    assert mask.data.all()


def test_large_masks_stay_sparse():
    """65,536 queries: a dense mask would be 4 GB."""
    n = 2**16
    mask = masks.hierarchical(n, 16)
    assert mask.nnz == n * (4 * 15 + 1)
    assert masks.longformer(n, 8, [0]).nnz < 20 * n


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda n, causal: masks.local(n, 8, causal=causal),
        lambda n, causal: masks.dilated(n, 8, 4, causal=causal),
        lambda n, causal: masks.strided(n, 128, causal=causal),
        lambda n, causal: masks.fixed(n, 128, causal=causal),
        lambda n, causal: masks.hierarchical(n, 8, causal=causal),
    ],
    ids=["local", "dilated", "strided", "fixed", "hierarchical"],
)
def test_no_mask_takes_more_memory_than_its_pairs(make, causal):
    n = 8192
    tracemalloc.start()
    mask = make(n, causal)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    two_way = make(n, False).nnz
    assert peak < 100 * two_way + 64 * n  # some copies of 8-byte indices, no n x n array
    assert mask.nnz <= two_way
