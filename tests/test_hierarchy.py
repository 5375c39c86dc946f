"""The block hierarchy: what each form is equal to, who gets the gradient, what it costs."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refattn
from cases import MECHANISMS, cases
from numbers_of import exact
from refattn.dispatch import row_form
from refusals import refused

EPS = float(np.finfo(float).eps)
block, block_vjp = refattn.block_attention, refattn.block_attention_vjp
two_level, two_level_vjp = refattn.two_level_attention, refattn.two_level_attention_vjp
FUSED = ["sum", "mean", "max", "weighted"]
HERE = ("block_attention", "two_level_attention")
seeds = st.integers(0, 2**32 - 1)


def draw(n, m, d=4, e=3, lead=(), seed=0):
    rng = np.random.default_rng([n, m, d, e, seed])
    q, k, v = (rng.standard_normal((*lead, *s)) for s in ((n, d), (m, d), (m, e)))
    return q, k, v, rng


def bound(name, q, k, v, **options):
    return 2 * MECHANISMS[name].tolerance(q, k, v, options, EPS)


def close(grads, wanted, rtol=1e-11):
    for g, w in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(g, w, rtol=rtol, atol=rtol * (1 + abs(w).max(initial=0)))


def weights_for(fuse, rng, *shape):
    return {"weights": rng.standard_normal(shape)} if fuse == "weighted" else {}


COMPOSITE = [case for case in cases([(6, 6, 3, 2), (12, 12, 4, 5)]) if case.mechanism.name in HERE]


@pytest.mark.parametrize("case", COMPOSITE, ids=str)
@pytest.mark.parametrize("scale", [1, 1e4])
def test_more_than_one_block_of_more_than_one_against_forty_digits(case, scale):
    q, k, v, options = case.build()
    y = case.mechanism.attention(scale * q, k, v, **options)
    truth = exact(case.mechanism.definition, scale * q, k, v, options)
    assert y.shape == truth.shape
    assert abs(y - truth).max() <= case.tolerance(scale * q, k, v, options)


# ---- what each form is equal to


@given(n=st.integers(1, 20), m=st.integers(1, 20), size=st.integers(1, 25), seed=seeds)
def test_exact_is_softmax_attention(n, m, size, seed):
    q, k, v, rng = draw(n, m, seed=seed)
    options = {"block": size, "fuse": "exact"}
    error = abs(block(q, k, v, **options) - refattn.softmax_attention(q, k, v)).max()
    assert error <= bound("block_attention", q, k, v, **options)
    dy = rng.standard_normal((n, 3))
    close(block_vjp(dy, q, k, v, **options), refattn.softmax_attention_vjp(dy, q, k, v))


@pytest.mark.parametrize("spread", [1e2, 1e4])
def test_exact_at_extreme_logits(spread):
    q, k, v, rng = draw(9, 11)
    q, dy = spread * q, rng.standard_normal((9, 3))
    grads = block_vjp(dy, q, k, v, block=3, fuse="exact")
    close(grads, refattn.softmax_attention_vjp(dy, q, k, v), rtol=1e-10)


@given(n=st.integers(1, 20), size=st.integers(1, 25), seed=seeds)
def test_concat_is_the_block_diagonal_mask(n, size, seed):
    q, k, v, rng = draw(n, n, seed=seed)
    mask = refattn.masks.block_diagonal(n, size)
    y = block(q, k, v, block=size)
    sparse = refattn.sparse_attention(q, k, v, mask=mask)
    assert abs(y - sparse).max() <= bound("block_attention", q, k, v, block=size)
    dy = rng.standard_normal((n, 3))
    close(
        block_vjp(dy, q, k, v, block=size),
        refattn.sparse_attention_vjp(dy, q, k, v, mask=mask),
    )


@pytest.mark.parametrize("size", [7, 8, 100])
@pytest.mark.parametrize("name", ["concat", "exact", "mean-level", "max-level"])
def test_one_block_is_softmax_attention(name, size):
    q, k, v, rng = draw(7, 7)
    dy = rng.standard_normal((7, 3))
    if name.endswith("level"):
        forward, vjp, options = two_level, two_level_vjp, {"block": size, "pool": name[:-6]}
    else:
        forward, vjp, options = block, block_vjp, {"block": size, "fuse": name}
    full = refattn.softmax_attention(q, k, v, scale=0.4)
    assert abs(forward(q, k, v, **options, scale=0.4) - full).max() <= bound(
        forward.__name__, q, k, v, **options, scale=0.4
    )
    wanted = refattn.softmax_attention_vjp(dy, q, k, v, scale=0.4)
    close(vjp(dy, q, k, v, **options, scale=0.4), wanted)


@pytest.mark.parametrize("fuse", FUSED)
def test_fusing_one_block_changes_nothing(fuse):
    q, k, v, _ = draw(7, 7)
    weights = {"weights": np.ones(1)} if fuse == "weighted" else {}
    y = block(q, k, v, block=7, fuse=fuse, **weights)
    np.testing.assert_array_equal(y, refattn.softmax_attention(q, k, v))


@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_the_fusions_are_what_their_names_say(lead):
    q, k, v, rng = draw(12, 12, lead=lead)
    parts = block(q, k, v, block=3).reshape(*lead, 4, 3, 3)  # (..., M, block, e)
    w = rng.standard_normal((*lead, 4))
    total = block(q, k, v, block=3, fuse="sum")
    close([total], [parts.sum(axis=-3)], 1e-13)
    close([block(q, k, v, block=3, fuse="mean")], [total / 4], 1e-13)
    np.testing.assert_array_equal(block(q, k, v, block=3, fuse="max"), parts.max(axis=-3))
    fused = block(q, k, v, block=3, fuse="weighted", weights=w)
    close([fused], [(w[..., None, None] * parts).sum(axis=-3)], 1e-13)
    ones = block(q, k, v, block=3, fuse="weighted", weights=np.ones(4))
    np.testing.assert_array_equal(ones, total)
    t = np.zeros(4)
    even = np.exp(t - t.max())
    even = block(q, k, v, block=3, fuse="weighted", weights=even / even.sum())
    close([even], [total / 4], 1e-13)


def test_a_sum_is_no_softmax_attention():
    """The chapter's formula as it stands: with equal scores M times the mean of the values."""
    zero, v = np.zeros((4, 1)), np.array([[0.0], [2.0], [4.0], [9.0]])
    full = refattn.softmax_attention(zero, zero, v)
    assert (block(zero, zero, v, block=2, fuse="sum") == 2 * full[:2]).all()
    assert (block(zero, zero, v, block=2, fuse="exact") == full).all()


# ---- gradients of the fusions


@pytest.mark.parametrize("fuse", FUSED)
def test_gradients_of_the_fusions_through_the_parts(fuse):
    q, k, v, rng = draw(12, 12)
    extra = weights_for(fuse, rng, 4)
    parts = block(q, k, v, block=3).reshape(4, 3, 3)
    dy = rng.standard_normal((3, 3))
    share = {
        "sum": np.ones((4, 1, 1)),
        "mean": np.full((4, 1, 1), 0.25),
        "max": parts == parts.max(axis=0),
        "weighted": extra.get("weights", np.zeros(4))[:, None, None],
    }[fuse]
    grads = block_vjp(dy, q, k, v, block=3, fuse=fuse, **extra)
    close(grads[:3], block_vjp((share * dy).reshape(12, 3), q, k, v, block=3))
    if fuse == "weighted":
        close(grads[3:], [(parts * dy).sum(axis=(1, 2))])


def test_ties_of_the_maximum_go_to_the_first_block():
    """Blocks 0 and 2 are the same tokens, and block 1 has smaller values."""
    q, k, v, rng = draw(3, 3)
    low = v - 10
    q, k, v = np.tile(q, (3, 1)), np.tile(k, (3, 1)), np.concatenate((v, low, v))
    dy = rng.standard_normal((3, 3))
    dq, dk, dv = block_vjp(dy, q, k, v, block=3, fuse="max")
    close((dq[:3], dk[:3], dv[:3]), refattn.softmax_attention_vjp(dy, q[:3], k[:3], v[:3]))
    assert not dq[3:].any() and not dk[3:].any() and not dv[3:].any()
    # the maximum in the middle: nothing for the ends
    *_, dv = block_vjp(dy, q, k, np.concatenate((low, low + 10, low)), block=3, fuse="max")
    assert dv[3:6].any() and not dv[:3].any() and not dv[6:].any()


def test_ties_of_a_pooled_maximum_go_to_the_first_key():
    """In block 1 keys 0 and 2 are equal and largest; block 0 sees it through its summary only."""
    q, k, v, rng = draw(6, 6)
    k[3], v[3] = 3 + abs(k[3]), 3 + abs(v[3])
    k[5], v[5] = k[3], v[3]
    dy = rng.standard_normal((6, 3))
    dy[3:] = 0  # so that only summaries bring gradient to block 1
    _, dk, dv = two_level_vjp(dy, q, k, v, block=3, pool="max")
    assert dk[3].all() and dv[3].all()
    assert not dk[4:].any() and not dv[4:].any()


def test_weights_have_leading_axes():
    q, k, v, rng = draw(6, 6, lead=(2, 3))
    w, dy = rng.standard_normal((2, 1, 3)), rng.standard_normal((2, 3, 2, 3))
    options = {"block": 2, "fuse": "weighted"}
    y = block(q, k, v, **options, weights=w)
    grads = block_vjp(dy, q, k, v, **options, weights=w)
    summed = np.zeros_like(w)
    for at in np.ndindex(2, 3):
        one = w[at[0], 0]
        alone = block(q[at], k[at], v[at], **options, weights=one)
        np.testing.assert_allclose(y[at], alone, rtol=1e-13, atol=1e-15)
        g = block_vjp(dy[at], q[at], k[at], v[at], **options, weights=one)
        close([x[at] for x in grads[:3]], g[:3])
        summed[at[0], 0] += g[3]
    assert grads[3].shape == w.shape
    close([grads[3]], [summed])
    full = block_vjp(dy, q, k, v, **options, weights=np.broadcast_to(w, (2, 3, 3)))
    close([grads[3]], [full[3].sum(axis=1, keepdims=True)])


def test_weights_are_rounded_to_the_dtype_of_q():
    q, k, v, rng = draw(6, 6)
    w = rng.standard_normal(2)
    low = [x.astype(np.float32) for x in (q, k, v)]
    y = block(*low, block=3, fuse="weighted", weights=w)
    single = block(*low, block=3, fuse="weighted", weights=w.astype(np.float32))
    np.testing.assert_array_equal(y, single)
    grads = block_vjp(y, *low, block=3, fuse="weighted", weights=w)
    assert y.dtype == np.float32 and all(g.dtype == np.float32 for g in grads)


# ---- two levels


@given(n=st.integers(1, 24), size=st.integers(1, 8), seed=seeds)
def test_equal_keys_in_a_block_make_two_levels_exact(n, size, seed):
    """Short last blocks too: a summary weighs as many keys as it stands for."""
    q, k, v, _ = draw(n, n, seed=seed)
    k = k[np.arange(n) // size * size]
    y = two_level(q, k, v, block=size)
    tolerance = bound("two_level_attention", q, k, v, block=size)
    assert abs(y - refattn.softmax_attention(q, k, v)).max() <= tolerance


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_blocks_of_one_make_two_levels_exact(pool):
    q, k, v, rng = draw(9, 9)
    dy = rng.standard_normal((9, 3))
    full = refattn.softmax_attention(q, k, v)
    y = two_level(q, k, v, block=1, pool=pool)
    assert abs(y - full).max() <= bound("two_level_attention", q, k, v, block=1)
    grads = two_level_vjp(dy, q, k, v, block=1, pool=pool)
    close(grads, refattn.softmax_attention_vjp(dy, q, k, v))


@given(n=st.integers(2, 20), size=st.integers(1, 6), seed=seeds)
def test_a_summary_weighs_at_most_what_its_block_does(n, size, seed):
    """Jensen: |I| exp(mean s) <= sum exp(s). One-hot values tell each block's share of the mass;
    against the query's own block, whose keys are all seen, no other gains."""
    q, k, *_ = draw(n, n, seed=seed)
    own = np.arange(n) // size
    v = (own[:, None] == np.arange(own[-1] + 1)).astype(float)  # (n, M)
    ours, full = two_level(q, k, v, block=size), refattn.softmax_attention(q, k, v)
    i = np.arange(n)
    ours, full = ours / ours[i, own][:, None], full / full[i, own][:, None]
    assert (ours <= full * (1 + 1e-12)).all()
    if size == 1:
        np.testing.assert_allclose(ours, full, rtol=1e-12)


def test_a_maximum_may_weigh_more():
    """Two keys 0 and 1: as a maximum both count exp(1), so the block gains mass."""
    q, k = np.ones((4, 1)), np.array([[0.0], [0.0], [0.0], [1.0]])
    v = np.array([[0.0], [0.0], [1.0], [1.0]])
    full = refattn.softmax_attention(q, k, v)[0, 0]
    assert two_level(q, k, v, block=2, pool="max")[0, 0] > full
    assert two_level(q, k, v, block=2)[0, 0] < full


def test_without_its_logarithm_a_summary_would_count_as_one_key():
    """Equal scores: 2 own keys and a block of 3 behind one summary of value 1."""
    zero, v = np.zeros((5, 1)), np.array([[1.0], [1.0], [1.0], [0.0], [0.0]])
    y = two_level(zero, zero, v, block=3)
    np.testing.assert_allclose(y, 3 / 5, rtol=1e-15)


@pytest.mark.parametrize("name", ["block_attention", "two_level_attention"])
def test_dy_is_rounded_to_the_dtype_of_q(name):
    q, k, v, rng = draw(6, 6)
    q, k, v = (x.astype(np.float16) for x in (q, k, v))
    dy = rng.standard_normal((6, 3))
    vjp = getattr(refattn, f"{name}_vjp")
    low = vjp(dy.astype(np.float16), q, k, v, block=2)
    for g, w in zip(vjp(dy, q, k, v, block=2), low, strict=True):
        assert g.dtype == np.float16
        np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize("size", [10**6, 2**63, 10**30])
def test_blocks_of_any_size(size):
    q, k, v, _ = draw(7, 7)
    full = refattn.softmax_attention(q, k, v)
    for y in (
        block(q, k, v, block=size),
        block(q, k, v, block=size, fuse="exact"),
        two_level(q, k, v, block=size),
    ):
        np.testing.assert_allclose(y, full, rtol=1e-13)
    assert refattn.block_attention_cost(7, 7, 4, 3, block=size).flops == 49 * 20
    assert refattn.two_level_attention_cost(7, 7, 4, 3, block=size).workspace == 4 * (7 + 49 + 49)


# ---- nothing leaks


@pytest.mark.parametrize("fuse", ["concat", "sum", "mean", "weighted"])
def test_gradients_stay_inside_their_block(fuse):
    """NaN in block 1 is seen by no query, key or value of the others."""
    q, k, v, rng = draw(9, 9)
    extra = weights_for(fuse, rng, 3)
    dy = rng.standard_normal(block(q, k, v, block=3, fuse=fuse, **extra).shape)
    clean = block_vjp(dy, q, k, v, block=3, fuse=fuse, **extra)[:3]
    for x in (q, k, v):
        x[3:6] = np.nan
    grads = block_vjp(dy, q, k, v, block=3, fuse=fuse, **extra)[:3]
    others = [0, 1, 2, 6, 7, 8]
    for g, c in zip(grads, clean, strict=True):
        np.testing.assert_array_equal(g[others], c[others])
        assert np.isnan(g[3:6]).any()


def test_a_maximum_does_not_hide_nan():
    q, k, v, _ = draw(6, 6)
    v[1, 0] = np.nan
    y = block(q, k, v, block=2, fuse="max")
    assert np.isnan(y[:, 0]).all() and np.isfinite(y[:, 1:]).all()
    y = two_level(q, k, v, block=2, pool="max")
    assert np.isnan(y[:, 0]).all() and np.isfinite(y[:, 1:]).all()


@pytest.mark.parametrize("fuse", ["concat", *FUSED, "exact"])
def test_no_positions_at_all(fuse):
    q, k, v, _ = draw(0, 0, lead=(2,))
    weights = {"weights": np.ones(0)} if fuse == "weighted" else {}
    y = block(q, k, v, block=3, fuse=fuse, **weights)
    assert y.shape == (2, 3 if fuse in FUSED else 0, 3) and not y.any()
    grads = block_vjp(y, q, k, v, block=3, fuse=fuse, **weights)
    assert [g.shape for g in grads] == [x.shape for x in (q, k, v, *weights.values())]
    cost = refattn.block_attention_cost(0, 0, 4, 3, block=3, fuse=fuse)
    assert cost.flops == 0 and cost.workspace == 0
    assert refattn.two_level_attention_cost(0, 0, 4, 3, block=3).flops == 0


# ---- some rows without the others


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("block_attention", {"block": 3}),
        ("block_attention", {"block": 4, "fuse": "concat", "scale": 0.3}),
        ("block_attention", {"block": 3, "fuse": "exact", "scale": 0.3}),
        ("two_level_attention", {"block": 3}),
        ("two_level_attention", {"block": 4, "pool": "max", "scale": 0.3}),
    ],
)
@pytest.mark.parametrize("rows", [[0, 3, 4, 9], [5], list(range(10)), []])
def test_rows(name, options, rows):
    q, k, v, rng = draw(10, 10)
    forward, vjp, form = row_form(name)(np.array(rows, int), 10, 10, **options)
    y = getattr(refattn, name)(q, k, v, **options)
    np.testing.assert_allclose(forward(q[rows], k, v, **form), y[rows], rtol=1e-13, atol=1e-15)
    dy = rng.standard_normal(y.shape)
    part = vjp(dy[rows], q[rows], k, v, **form)
    dy[~np.isin(np.arange(10), rows)] = 0
    dq, *rest = getattr(refattn, f"{name}_vjp")(dy, q, k, v, **options)
    close(part, (dq[rows], *rest))


def test_rows_in_half_precision_are_rounded_once():
    q, k, v, _ = draw(6, 6)
    q, k, v = (x.astype(np.float16) for x in (q, k, v))
    rows = np.array([1, 4])
    forward, _, form = row_form("two_level_attention")(rows, 6, 6, block=2)
    y = forward(q[rows], k, v, **form)
    assert y.dtype == np.float16
    np.testing.assert_array_equal(y, two_level(q, k, v, block=2)[rows])


@pytest.mark.parametrize("fuse", FUSED)
def test_fused_rows_do_not_go_one_by_one(fuse):
    weights = {"weights": np.ones(3)} if fuse == "weighted" else {}
    assert row_form("block_attention")(np.arange(2), 9, 9, block=3, fuse=fuse, **weights) is None


# ---- cost


def peak(function):
    function()
    tracemalloc.start()
    result = function()
    size = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    outputs = result if isinstance(result, tuple) else (result,)
    return size - sum(x.nbytes for x in outputs)


@pytest.mark.parametrize("n", [256, 1024])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("block_attention", {"block": 64}),
        ("block_attention", {"block": 64, "fuse": "mean"}),
        ("block_attention", {"block": 64, "fuse": "exact"}),
        ("two_level_attention", {"block": 64}),
    ],
)
def test_workspace_is_what_is_allocated(name, options, n):
    q = k = v = np.ones((n, 16), np.float32)
    counted = getattr(refattn, f"{name}_cost")(n, n, 16, 16, **options).workspace
    used = peak(lambda: getattr(refattn, name)(q, k, v, **options))
    assert counted <= used <= 8 * counted + 20_000


def test_workspace_and_bytes_by_hand():
    """n = 7, blocks of 3: 3 x 3 scores and 3 x 2 outputs; exact 7 x 3 scores, 7 x 2 outputs and two
    log-sum-exps; two levels 3 summaries, 5 keys and values seen, 3 x 5 scores."""
    for itemsize, working in ((2, 4), (4, 4), (8, 8)):
        sizes = {"block": 3, "itemsize": itemsize}
        cost = refattn.block_attention_cost(7, 7, 4, 2, **sizes)
        assert (cost.workspace, cost.bytes) == (working * (9 + 6), itemsize * 7 * (4 + 4 + 2 + 2))
        cost = refattn.block_attention_cost(7, 5, 4, 2, fuse="exact", **sizes)
        assert cost.workspace == working * (7 * 3 + 7 * 2 + 7 * 2)
        assert cost.bytes == itemsize * (7 * 4 + 5 * 4 + 5 * 2 + 7 * 2)
        cost = refattn.block_attention_cost(6, 6, 4, 2, fuse="weighted", **sizes)
        assert cost.bytes == itemsize * (6 * (4 + 4 + 2) + 3 * 2 + 2)
        cost = refattn.two_level_attention_cost(7, 7, 4, 2, **sizes)
        assert cost.workspace == working * (3 * 6 + 5 * 6 + 15)
        assert cost.bytes == itemsize * 7 * (4 + 4 + 2 + 2)


def test_costs_refuse_sizes_that_cannot_be():
    for cost in (refattn.block_attention_cost, refattn.two_level_attention_cost):
        with refused(ValueError, "n is -1"):
            cost(-1, 4, 3, 2, block=2)
        with refused(TypeError, "e is 2.5"):
            cost(4, 4, 3, 2.5, block=2)


def test_exact_never_makes_an_array_of_all_pairs():
    n = 2048
    q = k = v = np.ones((n, 8), np.float32)
    options = {"block": 32, "fuse": "exact"}
    assert peak(lambda: block(q, k, v, **options)) < n * n * 4 / 8
    assert peak(lambda: block_vjp(q, q, k, v, **options)) < n * n * 4 / 8


def test_exact_saves_memory_and_no_work():
    ours = refattn.block_attention_cost(4096, 4096, 64, 64, block=64, fuse="exact")
    full = refattn.softmax_attention_cost(4096, 4096, 64, 64)
    assert full.flops < ours.flops < 1.02 * full.flops
    assert ours.workspace < full.workspace / 20 and ours.bytes == full.bytes


def test_two_levels_cost_n_to_the_three_halves():
    def flops(n, b):
        return refattn.two_level_attention_cost(n, n, 64, 64, block=b).flops

    best = min(range(1, 1025), key=lambda b: flops(1024, b))
    assert 28 <= best <= 36
    slope = math.log(flops(2**16, 2**8) / flops(2**12, 2**6)) / math.log(16)
    assert abs(slope - 1.5) < 0.01


# ---- errors

x, w = np.ones((4, 3)), np.ones((4, 2))


@pytest.mark.parametrize("suffix", ["", "_vjp", "_cost"])
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"block": 0}, ValueError, ["block is 0", ">= 1"]),
        ({"block": 2.0}, TypeError, ["block is 2.0", "integer"]),
        ({"block": True}, TypeError, ["block is True"]),
        ({"block": 2, "fuse": "add"}, ValueError, ["fuse is 'add'", "'concat'", "'exact'"]),
        ({"block": 2, "fuse": None}, ValueError, ["fuse is None"]),
        ({"block": 3, "fuse": "sum"}, ValueError, ["n is 4", "block 3", "'sum'", "multiple"]),
        ({"block": 5, "fuse": "max"}, ValueError, ["n is 4", "block 5"]),
    ],
)
def test_block_options(suffix, options, error, words):
    args = {"": (x, x, w), "_vjp": (w, x, x, w), "_cost": (4, 4, 3, 2)}[suffix]
    with refused(error, *words):
        getattr(refattn, f"block_attention{suffix}")(*args, **options)


@pytest.mark.parametrize(
    ("fuse", "weights", "error", "words"),
    [
        ("weighted", None, ValueError, ["weights is None", "'weighted'"]),
        ("sum", np.ones(2), ValueError, ["weights came", "fuse='sum'"]),
        ("concat", np.ones(2), ValueError, ["weights came", "fuse='concat'"]),
        ("exact", np.ones(2), ValueError, ["weights came", "fuse='exact'"]),
        ("weighted", np.ones(3), ValueError, [r"weights has shape \(3,\)", "M = 2"]),
        ("weighted", np.ones(1), ValueError, [r"weights has shape \(1,\)", "M = 2"]),
        ("weighted", np.float64(1), ValueError, [r"weights has shape \(\)", "M = 2"]),
        ("weighted", np.ones((3, 2)), ValueError, [r"\(3, 2\)", "broadcasts"]),
        ("weighted", np.ones(2, int), TypeError, ["weights has dtype int64"]),
    ],
)
def test_weights(fuse, weights, error, words):
    out = w[:2] if fuse in FUSED else w
    with refused(error, *words):
        block(x, x, w, block=2, fuse=fuse, weights=weights)
    with refused(error, *words):
        block_vjp(out, x, x, w, block=2, fuse=fuse, weights=weights)
    if weights is None or fuse != "weighted":
        with refused(error, *words):
            row_form("block_attention")(np.arange(2), 4, 4, block=2, fuse=fuse, weights=weights)


@pytest.mark.parametrize("fuse", ["concat", *FUSED])
def test_all_but_exact_need_as_many_queries_as_keys(fuse):
    with refused(ValueError, "q has 2 rows", "k has 4", "exact"):
        block(x[:2], x, w, block=2, fuse=fuse, **weights_for(fuse, np.random.default_rng(0), 2))
    with refused(ValueError, "q has 2 rows", "k has 4"):
        refattn.block_attention_cost(2, 4, 3, 2, block=2, fuse=fuse)
    assert block(x[:2], x, w, block=3, fuse="exact").shape == (2, 2)


@pytest.mark.parametrize("suffix", ["", "_vjp", "_cost"])
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"block": 0}, ValueError, ["block is 0", ">= 1"]),
        ({"block": "2"}, TypeError, ["block is '2'", "integer"]),
        ({"block": 2, "pool": "sum"}, ValueError, ["pool is 'sum'", "'mean', 'max'"]),
    ],
)
def test_two_level_options(suffix, options, error, words):
    args = {"": (x, x, w), "_vjp": (w, x, x, w), "_cost": (4, 4, 3, 2)}[suffix]
    with refused(error, *words):
        getattr(refattn, f"two_level_attention{suffix}")(*args, **options)
    with refused(ValueError, "q has 2 rows", "k has 4"):
        two_level(x[:2], x, w, block=2)
    with refused(ValueError, "q has 2 rows", "k has 4"):
        row_form("two_level_attention")(np.arange(1), 2, 4, block=2)


def test_the_output_of_a_fusion_fixes_the_shape_of_dy():
    with refused(ValueError, "dy has shape", r"\(4, 2\)", r"\(2, 2\)"):
        block_vjp(w, x, x, w, block=2, fuse="sum")
    with refused(ValueError, "dy has shape", r"\(2, 2\)", r"\(4, 2\)"):
        block_vjp(w[:2], x, x, w, block=2)


def test_parts_whose_scores_are_all_minus_infinity():
    """Finite float32 that overflows: as softmax attention, no gradient and no warning."""
    q, k = np.full((2, 1), 1e20, np.float32), np.full((4, 1), -1e20, np.float32)
    v = np.ones((4, 1), np.float32)
    for options in ({"block": 2, "fuse": "exact"}, {"block": 4}):
        inputs = (q, k, v) if "fuse" in options else (np.repeat(q, 2, axis=0), k, v)
        y = refattn.block_attention(*inputs, **options)
        grads = refattn.block_attention_vjp(np.ones_like(y), *inputs, **options)
        assert not y.any() and not any(g.any() for g in grads)
    k[:2] = 1.0
    v[2] = np.nan  # in a part that counts for nothing
    k[2:] = -np.inf
    y = refattn.block_attention(q, k, v, block=2, fuse="exact")
    dq, dk, dv = refattn.block_attention_vjp(np.ones_like(y), q, k, v, block=2, fuse="exact")
    assert (y == 1).all() and np.isfinite(dk[:2]).all() and np.isfinite(dv[:2]).all()
