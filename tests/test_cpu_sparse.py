"""The compiled kernel of csr masks: its patterns, tiles, leaks, bits and layouts."""

import numba
import numpy as np
import pytest
import scipy

import refattn
from refattn import masks
from refattn.sparse import csr_cpu
from refattn.sparse.csr_cpu import sparse_attention, sparse_attention_vjp
from refattn.sparse.plan import LEAST, WIDE, plan_of
from refattn.verify.cases import Trial
from refattn.verify.wanted import wanted_of

DTYPES = [np.float64, np.float32]


def csr(dense):
    return scipy.sparse.csr_array(np.asarray(dense, bool))


def scattered(n, m, share, seed=0):
    return csr(np.random.default_rng(seed).random((n, m)) < share)


# Tiles of 64 queries: sizes of several, whole and not; dense columns, pairs one by one, and both.
MASKS = {
    "local": masks.local(333, 20),
    "local, more keys": masks.local(200, (30, 5), m=333),
    "local, fewer keys": masks.local(333, 40, m=200, causal=True),
    "dilated": masks.dilated(333, 9, 4),
    "causal": masks.causal(200),
    "strided": masks.strided(333, 18),
    "fixed": masks.fixed(333, 24, summary=2, causal=True),
    "global": masks.longformer(333, 3, [0, 70, 71, 300]),
    "random": masks.random(333, 9, rng=0),
    "random, more keys": masks.random(65, 30, rng=0, m=1000),
    "hierarchical": masks.hierarchical(333, 4),
    "hierarchical causal": masks.hierarchical(256, 16, causal=True),
    "bigbird": masks.bigbird(333, 64, global_blocks=1, random_blocks=1, rng=0),
    "bigbird, short blocks": masks.bigbird(200, 10, rng=0),
    "block causal": masks.block_causal(200, 48),
    "thick": scattered(200, 333, 0.3),
    "on the edge": scattered(130, 200, LEAST / WIDE),
    "one query": masks.causal(1, 200),
    "one key": csr(np.ones((200, 1))),
}


class Formula:
    """The truth, as ``wanted_of`` wants it."""

    mechanism = "sparse_attention"

    forward, vjp = (
        staticmethod(refattn.sparse_attention),
        staticmethod(refattn.sparse_attention_vjp),
    )


def draw(mask, dtype=np.float64, lead=(), d=7, e=5, size=1.0):
    """dy, q, k and v."""
    n, m = mask.shape
    rng = np.random.default_rng([n, m])
    shapes = ((n, e), (n, d), (m, d), (m, e))
    dy, q, k, v = (rng.standard_normal((*lead, *s)).astype(dtype) for s in shapes)
    return dy, (size * q).astype(dtype), k, v


def agrees(mask, dtype, scale=None, **options):
    dy, q, k, v = draw(mask, dtype, **options)
    given = {"mask": mask, "scale": scale}
    wanted = wanted_of(Formula, Trial("", q, k, v, dy), given, given, gradients=True)
    y, grads = sparse_attention(q, k, v, **given), sparse_attention_vjp(dy, q, k, v, **given)
    for name, x in zip(("y", "dq", "dk", "dv"), (y, *grads), strict=True):
        want = wanted[name]
        assert x.dtype == dtype and x.shape == want.value.shape, name
        gap = abs(x.astype(float) - want.value).max(initial=0)
        assert gap <= want.budget, (name, gap, want.budget)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_forward_and_gradient(mask, dtype):
    agrees(mask, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["global", "hierarchical", "random", "bigbird"])
def test_large_scores_and_a_scale(name, dtype):
    agrees(MASKS[name], dtype, scale=0.8, size=100.0)
    agrees(MASKS[name], dtype, scale=-0.3)


@pytest.mark.parametrize("name", ["global", "hierarchical", "bigbird"])
@pytest.mark.parametrize(("d", "e"), [(1, 1), (64, 3), (3, 64), (33, 32)])
def test_columns_of_any_number(name, d, e):
    agrees(MASKS[name], np.float32, d=d, e=e)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_plan_holds_each_pair_once(mask):
    plan, n = plan_of(mask), mask.shape[0]
    times = np.zeros(mask.shape, int)
    for t, count in enumerate(plan.dense):
        dense = slice(plan.start[t], plan.start[t] + count)
        columns, bits = plan.columns[dense], plan.bits[dense]
        assert (np.diff(columns) > 0).all()
        for a in range(min(WIDE, n - t * WIDE)):
            times[t * WIDE + a, columns] += (bits >> np.uint64(a)).astype(int) & 1
        assert (times[t * WIDE : (t + 1) * WIDE, columns].sum(axis=0) >= LEAST).all()
    for i in range(n):
        times[i, plan.rest[plan.indptr[i] :][: plan.left[i]]] += 1
    np.testing.assert_array_equal(times, mask.toarray().astype(int))


def test_who_goes_one_by_one():
    """A query that sees everything does not make its tile dense; blocks are dense to the last."""
    seldom = plan_of(masks.global_tokens(640, [100]))
    assert seldom.dense.sum() == 10 and seldom.left[100] >= 630  # its column, and its row
    assert plan_of(masks.block_diagonal(640, 64)).left.sum() == 0
    assert plan_of(masks.random(640, 3, rng=0)).dense.sum() == 0


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_types_are_rounded_once(name):
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else np.float16
    mask = MASKS["global"]
    low = draw(mask, dtype)
    wide = [x.astype(np.float32) for x in low]
    y, grads = sparse_attention(*low[1:], mask=mask), sparse_attention_vjp(*low, mask=mask)
    want = sparse_attention(*wide[1:], mask=mask), *sparse_attention_vjp(*wide, mask=mask)
    for x, w in zip((y, *grads), want, strict=True):
        assert x.dtype == dtype
        np.testing.assert_array_equal(x, w.astype(dtype))


LEADS = [
    ((2, 3), (2, 3), (2, 3)),
    ((2, 3), (1, 3), (3,)),
    ((4, 1, 2), (3, 1), ()),
    ((), (2,), (1,)),
    ((9,), (9,), (9,)),
]


@pytest.mark.parametrize("leads", LEADS, ids=str)
def test_leading_axes_broadcast(leads):
    mask = MASKS["bigbird, short blocks"]
    _, *qkv = draw(mask)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((*lead, *x.shape)) for lead, x in zip(leads, qkv, strict=True))
    y = sparse_attention(q, k, v, mask=mask)
    want = refattn.sparse_attention(q, k, v, mask=mask)
    assert y.shape == want.shape
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-13)
    dy = rng.standard_normal(y.shape)
    grads = sparse_attention_vjp(dy, q, k, v, mask=mask)
    for g, w, x in zip(
        grads, refattn.sparse_attention_vjp(dy, q, k, v, mask=mask), (q, k, v), strict=True
    ):
        assert g.shape == w.shape == x.shape
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-12)


def same(mask, other):
    """The same answers for two masks, to the bit."""
    dy, q, k, v = draw(mask)
    np.testing.assert_array_equal(
        sparse_attention(q, k, v, mask=mask), sparse_attention(q, k, v, mask=other)
    )
    for g, h in zip(
        *(sparse_attention_vjp(dy, q, k, v, mask=m) for m in (mask, other)), strict=True
    ):
        np.testing.assert_array_equal(g, h)


def test_masks_in_any_form():
    mask = MASKS["global"]
    n, m = mask.shape
    wide = mask.indices.astype(np.int64), mask.indptr.astype(np.int64)
    same(mask, scipy.sparse.csr_array((mask.data, *wide), shape=mask.shape))
    order = np.concatenate(
        [np.arange(a, b)[::-1] for a, b in zip(mask.indptr[:-1], mask.indptr[1:], strict=True)]
    )
    parts = mask.data, mask.indices[order], mask.indptr
    same(mask, scipy.sparse.csr_array(parts, shape=mask.shape))
    hidden = scipy.sparse.csr_array(np.ones((n, m), bool))
    hidden.data[:] = mask.toarray().ravel()
    assert hidden.nnz == n * m
    same(mask, hidden)
    for part in (mask.data, mask.indices, mask.indptr):
        part.setflags(write=False)
    try:
        same(mask, mask.copy())
    finally:
        for part in (mask.data, mask.indices, mask.indptr):
            part.setflags(write=True)


def test_queries_and_keys_without_pairs():
    """Output and gradient 0, and nothing of theirs in anybody's sums."""
    rng = np.random.default_rng(0)
    dense = rng.random((200, 150)) < 0.3
    rows, columns = [0, 63, 64, 199, *range(128, 192)], [0, 70, 149]
    dense[rows], dense[:, columns] = False, False
    agrees(csr(dense), np.float64)
    dy, q, k, v = draw(csr(dense))
    q[rows], k[columns], v[columns] = np.nan, np.inf, np.nan
    y = sparse_attention(q, k, v, mask=csr(dense))
    dq, dk, dv = sparse_attention_vjp(dy, q, k, v, mask=csr(dense))
    for x in (y, dq, dk, dv):
        assert np.isfinite(x).all()
    for x, where in ((y, rows), (dq, rows), (dk, columns), (dv, columns)):
        assert (x[where] == 0).all()


@pytest.mark.parametrize(
    ("n", "m", "lead"), [(0, 5, ()), (5, 0, ()), (70, 70, (0, 2)), (70, 80, (2,))]
)
def test_nothing_to_compute(n, m, lead):
    mask = csr(np.zeros((n, m)))
    dy, q, k, v = draw(mask, np.float32, lead=lead)
    y, grads = sparse_attention(q, k, v, mask=mask), sparse_attention_vjp(dy, q, k, v, mask=mask)
    assert y.shape == dy.shape and y.dtype == np.float32 and not y.any()
    for g, x in zip(grads, (q, k, v), strict=True):
        assert g.shape == x.shape and g.dtype == np.float32 and not g.any()


def test_values_without_columns_and_an_empty_batch():
    mask = MASKS["causal"]
    dy, q, k, v = draw(mask, e=0)
    assert sparse_attention(q, k, v, mask=mask).shape == (200, 0)
    assert not any(g.any() for g in sparse_attention_vjp(dy, q, k, v, mask=mask))
    dy, q, k, v = draw(mask, lead=(0, 3))
    assert sparse_attention(q, k, v, mask=mask).shape == (0, 3, 200, 5)
    assert sparse_attention_vjp(dy, q, k, v, mask=mask)[2].shape == (0, 3, 200, 5)


def test_a_full_mask_is_softmax_attention():
    mask = csr(np.ones((200, 150)))
    dy, q, k, v = draw(mask, lead=(2,))
    y = sparse_attention(q, k, v, mask=mask)
    np.testing.assert_allclose(y, refattn.softmax_attention(q, k, v), rtol=0, atol=1e-14)
    grads = sparse_attention_vjp(dy, q, k, v, mask=mask)
    for g, w in zip(grads, refattn.softmax_attention_vjp(dy, q, k, v), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-13)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["local", "global", "random", "hierarchical", "bigbird"])
def test_hidden_keys_do_not_leak(name, value):
    """The rest is as if they were ordinary, and who sees them gets what the formula gives."""
    mask = MASKS[name]
    plain = draw(mask)
    dy, q, k, v = (x.copy() for x in plain)
    bad = [207, 250]
    k[bad], v[bad] = value, value
    sees = mask.toarray()[:, bad].any(axis=1)
    assert sees.any() and not sees.all()
    y = sparse_attention(q, k, v, mask=mask)
    np.testing.assert_allclose(
        y[~sees], sparse_attention(*plain[1:], mask=mask)[~sees], rtol=0, atol=1e-14
    )
    np.testing.assert_array_equal(
        np.isnan(y), np.isnan(refattn.sparse_attention(q, k, v, mask=mask))
    )
    grads = sparse_attention_vjp(dy, q, k, v, mask=mask)
    for g, w in zip(grads, refattn.sparse_attention_vjp(dy, q, k, v, mask=mask), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-12)
    assert np.isfinite(grads[0][~sees]).all()


def test_bad_rows_in_one_head_only():
    """A whole batch goes by the kernel but for the tiles that are not finite."""
    mask = MASKS["local"]
    dy, q, k, v = draw(mask, lead=(3,))
    v[1, 5] = np.nan
    y = sparse_attention(q, k, v, mask=mask)
    np.testing.assert_allclose(y, refattn.sparse_attention(q, k, v, mask=mask), rtol=0, atol=1e-13)
    grads = sparse_attention_vjp(dy, q, k, v, mask=mask)
    for g, w in zip(grads, refattn.sparse_attention_vjp(dy, q, k, v, mask=mask), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-12)


def test_the_formula_gets_few_pairs_at_a_time(monkeypatch):
    """Where it stands in for the kernel, memory stays bounded: more pieces, the same gradient."""
    mask = MASKS["global"]
    dy, q, k, v = draw(mask, lead=(2,))
    v[0, 200] = np.nan
    monkeypatch.setattr(csr_cpu, "PAIRS", 500)
    grads = sparse_attention_vjp(dy, q, k, v, mask=mask)
    for g, w in zip(grads, refattn.sparse_attention_vjp(dy, q, k, v, mask=mask), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (9,)], ids=["parts of a head", "whole heads"])
@pytest.mark.parametrize("name", ["global", "hierarchical", "bigbird"])
def test_the_same_bits_for_any_number_of_threads(name, lead):
    mask = MASKS[name]
    dy, q, k, v = draw(mask, np.float32, lead=lead)
    most = numba.config.NUMBA_NUM_THREADS
    found = []
    for threads in (1, min(2, most), most, most):
        numba.set_num_threads(threads)
        try:
            y = sparse_attention(q, k, v, mask=mask)
            found.append((y, *sparse_attention_vjp(dy, q, k, v, mask=mask)))
        finally:
            numba.set_num_threads(most)
    for other in found[1:]:
        for x, w in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(x, w)


def test_inputs_in_any_layout():
    mask = MASKS["hierarchical"]
    plain = draw(mask, np.float32, lead=(2,), d=4, e=4)
    kept = [x.copy() for x in plain]
    want = sparse_attention(*plain[1:], mask=mask), *sparse_attention_vjp(*plain, mask=mask)
    layouts = [
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: x[:, ::-1].copy()[:, ::-1],
        lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),  # read-only
    ]
    for layout in layouts:
        dy, q, k, v = map(layout, plain)
        found = sparse_attention(q, k, v, mask=mask), *sparse_attention_vjp(dy, q, k, v, mask=mask)
        for x, w in zip(found, want, strict=True):
            np.testing.assert_array_equal(x, w)
    for x, before in zip(plain, kept, strict=True):
        np.testing.assert_array_equal(x, before)


def test_errors_read_as_the_formulas():
    dy, q, k, v = draw(MASKS["local"])
    for mask in (MASKS["local"].toarray(), masks.local(10, 1), MASKS["local"].astype(float)):
        for arrays, kernel, formula in (
            ((q, k, v), sparse_attention, refattn.sparse_attention),
            ((dy, q, k, v), sparse_attention_vjp, refattn.sparse_attention_vjp),
        ):
            with pytest.raises((TypeError, ValueError)) as wanted:
                formula(*arrays, mask=mask)
            with pytest.raises(type(wanted.value)) as found:
                kernel(*arrays, mask=mask)
            assert str(found.value) == str(wanted.value)
    with pytest.raises(ValueError, match="dy has shape"):
        sparse_attention_vjp(dy[1:], q, k, v, mask=MASKS["local"])
