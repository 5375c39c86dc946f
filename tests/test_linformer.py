"""Linformer: what it is equal to, what may not leak, and the projections' promises."""

import math
import tracemalloc

import numpy as np
import pytest

import refattn
from cases import MECHANISMS
from definitions.linformer import segment_means
from numbers_of import exact
from refattn.dispatch import row_form
from refattn.linformer import projections
from refusals import refused

EPS = float(np.finfo(float).eps)
LINFORMER = MECHANISMS["linformer_attention"]
linformer, linformer_vjp = refattn.linformer_attention, refattn.linformer_attention_vjp


def draw(n, m, d, e, lead=(), seed=0):
    rng = np.random.default_rng([n, m, d, e, seed])
    q, k, v = (rng.standard_normal((*lead, *s)) for s in ((n, d), (m, d), (m, e)))
    return q, k, v, rng


def bound(q, k, v, **options):
    return 2 * LINFORMER.tolerance(q, k, v, options, EPS)


@pytest.mark.parametrize("m", [1, 5, 12])
def test_the_identity_and_permutations_give_softmax_attention(m):
    q, k, v, rng = draw(7, m, 4, 3)
    dy = rng.standard_normal((7, 3))
    full = refattn.softmax_attention(q, k, v)
    wanted = refattn.softmax_attention_vjp(dy, q, k, v)
    for E in (np.eye(m), np.eye(m)[rng.permutation(m)], projections.mean_pool(m, m)):
        assert abs(linformer(q, k, v, E=E) - full).max() <= bound(q, k, v, E=E)
        for g, w in zip(linformer_vjp(dy, q, k, v, E=E), wanted):
            np.testing.assert_allclose(g, w, rtol=1e-11, atol=1e-13)


def test_it_is_softmax_attention_on_the_projected_rows():
    q, k, v, rng = draw(6, 9, 3, 2)
    E, F = rng.standard_normal((2, 4, 9))
    y = linformer(q, k, v, E=E, F=F, scale=0.3)
    np.testing.assert_array_equal(y, refattn.softmax_attention(q, E @ k, F @ v, scale=0.3))


def test_segments_of_equal_keys_are_summarised_without_loss():
    """r segments of equal length, one key in each: the softmax of m and that of r agree."""
    q, k, v, _ = draw(8, 5, 4, 3)
    k, values = np.repeat(k, 4, axis=0), draw(8, 20, 4, 3)[2]
    E = projections.mean_pool(5, 20)
    y = linformer(q, k, values, E=E)
    assert abs(y - refattn.softmax_attention(q, k, values)).max() <= bound(q, k, values, E=E)


def test_leading_axes_of_the_projections():
    """Each head may have its own; its gradient sums over the axes that it lacks."""
    q, k, v, rng = draw(5, 6, 3, 2, lead=(2, 3))
    E, F = rng.standard_normal((3, 4, 6)), rng.standard_normal((2, 1, 4, 6))
    mask = rng.random((2, 1, 6)) < 0.6
    options = {"E": E, "F": F, "key_mask": mask}
    y = linformer(q, k[:1], v, **options)
    dy = rng.standard_normal(y.shape)
    dq, dk, dv, dE, dF = linformer_vjp(dy, q, k[:1], v, **options)
    assert [g.shape for g in (dq, dk, dv, dE, dF)] == [x.shape for x in (q, k[:1], v, E, F)]
    sums = [np.zeros_like(x) for x in (k[:1], E, F)]
    for b, h in np.ndindex(2, 3):
        one = {"E": E[h], "F": F[b, 0], "key_mask": mask[b, 0]}
        inputs = q[b, h], k[0, h], v[b, h]
        np.testing.assert_allclose(y[b, h], linformer(*inputs, **one), rtol=1e-12, atol=1e-14)
        grads = linformer_vjp(dy[b, h], *inputs, **one)
        np.testing.assert_allclose(dq[b, h], grads[0], rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(dv[b, h], grads[2], rtol=1e-11, atol=1e-13)
        for total, at, g in zip(sums, ((0, h), h, (b, 0)), (grads[1], *grads[3:])):
            total[at] += g
    for g, total in zip((dk, dE, dF), sums):
        np.testing.assert_allclose(g, total, rtol=1e-11, atol=1e-12)


def test_a_shared_projection_gets_both_gradients():
    q, k, v, rng = draw(5, 6, 3, 2)
    E, dy = rng.standard_normal((4, 6)), rng.standard_normal((5, 2))
    *shared, dE = linformer_vjp(dy, q, k, v, E=E)
    *apart, dE_k, dE_v = linformer_vjp(dy, q, k, v, E=E, F=E.copy())
    for a, b in zip(shared, apart, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(dE, dE_k + dE_v, rtol=1e-13)


def test_hidden_keys_are_as_good_as_absent():
    q, k, v, rng = draw(5, 8, 3, 2)
    E, F, dy = rng.standard_normal((3, 8)), rng.standard_normal((3, 8)), rng.standard_normal((5, 2))
    visible = np.array([True, False, True, True, False, True, False, True])
    y = linformer(q, k, v, E=E, F=F, key_mask=visible)
    inputs = q, k[visible], v[visible]
    options = {"E": E[:, visible], "F": F[:, visible]}
    assert abs(y - linformer(*inputs, **options)).max() <= bound(*inputs, **options)
    grads = linformer_vjp(dy, q, k, v, E=E, F=F, key_mask=visible)
    kept = (grads[0], *(g[visible] for g in grads[1:3]), *(g[:, visible] for g in grads[3:]))
    for g, w in zip(kept, linformer_vjp(dy, *inputs, **options), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-11, atol=1e-13)
    assert not any(g[~visible].any() for g in grads[1:3])
    assert not any(g[:, ~visible].any() for g in grads[3:])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("shared", [True, False])
def test_what_stands_at_hidden_keys_reaches_nothing(poison, shared):
    """Not from keys, not from values, and not from the projections' own columns."""
    q, k, v, rng = draw(5, 8, 3, 2)
    E, F, dy = rng.standard_normal((3, 8)), rng.standard_normal((3, 8)), rng.standard_normal((5, 2))
    hidden = [1, 4, 7]
    options = {"E": E, "key_mask": ~np.isin(np.arange(8), hidden)} | ({} if shared else {"F": F})
    clean = linformer(q, k, v, **options), *linformer_vjp(dy, q, k, v, **options)
    k[hidden], v[hidden], E[:, hidden], F[:, hidden] = poison, poison, poison, poison
    again = linformer(q, k, v, **options), *linformer_vjp(dy, q, k, v, **options)
    assert len(clean) == (5 if shared else 6)
    for a, b in zip(clean, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_poisoned_query_leaves_hidden_keys_without_gradient():
    q, k, v, rng = draw(5, 8, 3, 2)
    visible = np.arange(8) > 2
    q[0] = np.nan
    _, dk, dv, dE = linformer_vjp(
        np.ones((5, 2)), q, k, v, E=rng.standard_normal((3, 8)), key_mask=visible
    )
    assert not dk[~visible].any() and not dv[~visible].any() and not dE[:, ~visible].any()
    assert np.isnan(dk[visible]).all()


def test_projections_are_rounded_to_the_dtype_of_q():
    q, k, v, rng = draw(5, 6, 3, 2)
    E = rng.standard_normal((4, 6))
    low = [x.astype(np.float32) for x in (q, k, v)]
    y = linformer(*low, E=E, F=E)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, linformer(*low, E=E.astype(np.float32)))
    grads = linformer_vjp(y, *low, E=E, F=E)
    assert all(g.dtype == np.float32 for g in grads)
    half = [x.astype(np.float16) for x in (q, k, v)]
    single = [x.astype(np.float32) for x in half]
    rounded = E.astype(np.float16).astype(np.float32)
    wanted = linformer(*single, E=rounded).astype(np.float16)
    np.testing.assert_array_equal(linformer(*half, E=E), wanted)


def test_some_rows_without_the_others():
    q, k, v, rng = draw(9, 6, 3, 2)
    E, dy = rng.standard_normal((4, 6)), rng.standard_normal((9, 2))
    rows = np.array([0, 3, 8])
    forward, vjp, options = row_form("linformer_attention")(rows, 9, 6, E=E, scale=0.4)
    y = linformer(q, k, v, E=E, scale=0.4)
    np.testing.assert_allclose(forward(q[rows], k, v, **options), y[rows], rtol=1e-13, atol=1e-15)
    open_ = np.isin(np.arange(9), rows)[:, None]
    whole = linformer_vjp(dy * open_, q, k, v, E=E, scale=0.4)
    part = vjp(dy[rows], q[rows], k, v, **options)
    for g, w in zip(part, (whole[0][rows], *whole[1:]), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-11, atol=1e-13)


# ---- cost


@pytest.mark.parametrize("n", [256, 1024])
def test_workspace_is_what_is_allocated(n):
    q = k = v = np.ones((n, 16), np.float32)
    E = projections.mean_pool(32, n).astype(np.float32)
    counted = refattn.linformer_attention_cost(n, n, 16, 16, r=32).workspace
    linformer(q, k, v, E=E)
    tracemalloc.start()
    y = linformer(q, k, v, E=E)
    peak = tracemalloc.get_traced_memory()[1] - y.nbytes
    tracemalloc.stop()
    assert counted <= peak <= 8 * counted + 20_000


def test_cost_is_linear_in_the_length():
    first, second = (refattn.linformer_attention_cost(n, n, 64, 64, r=64) for n in (1024, 4096))
    assert second.flops == 4 * first.flops
    full = refattn.softmax_attention_cost(4096, 4096, 64, 64)
    assert second.flops < full.flops / 20


@pytest.mark.parametrize("itemsize", [4, 8])
def test_bytes_of_a_mask_and_of_a_second_projection(itemsize):
    plain = refattn.linformer_attention_cost(5, 7, 3, 2, r=4, itemsize=itemsize)
    both = refattn.linformer_attention_cost(5, 7, 3, 2, r=4, F=True, key_mask=6, itemsize=itemsize)
    assert both.bytes - plain.bytes == 4 * 7 * itemsize + 7
    assert plain.flops - both.flops == 2 * 4 * (3 + 2)  # one key less in both projections


def test_workspace_by_hand():
    """E k and F v have 4 (3 + 2) = 20 numbers, the scores 5 * 4; half types take 4 bytes each."""
    for itemsize, working in ((2, 4), (4, 4), (8, 8)):
        cost = refattn.linformer_attention_cost(5, 7, 3, 2, r=4, itemsize=itemsize)
        assert cost.workspace == working * (20 + 20)


@pytest.mark.parametrize(
    ("sizes", "error", "words"),
    [
        ({"r": 0}, ValueError, ["r is 0", ">= 1"]),
        ({"r": 2.0}, TypeError, ["r is 2.0"]),
        ({"r": 2, "key_mask": 8}, ValueError, ["key_mask is 8", "from 0 to 7"]),
        ({"r": 2, "key_mask": True}, TypeError, ["key_mask is True"]),
        ({"r": 2, "F": 1}, TypeError, ["F is 1", "True or False"]),
    ],
)
def test_costs_refuse_sizes_that_cannot_be(sizes, error, words):
    with refused(error, *words):
        refattn.linformer_attention_cost(5, 7, 3, 2, **sizes)
    with refused(ValueError, "n is -1"):
        refattn.linformer_attention_cost(-1, 7, 3, 2, r=2)


# ---- projections


@pytest.mark.parametrize(("r", "m"), [(1, 1), (1, 5), (5, 5), (2, 5), (3, 10), (7, 31), (64, 100)])
def test_mean_pool_averages_segments(r, m):
    E = projections.mean_pool(r, m)
    x = np.random.default_rng(m).standard_normal((m, 3))
    np.testing.assert_allclose(E @ x, segment_means(x.tolist(), r), rtol=1e-13, atol=1e-14)
    sizes = (E > 0).sum(axis=1)
    assert sizes.sum() == m and set(sizes) <= {m // r, m // r + 1}
    assert (np.diff((E > 0).argmax(axis=0)) >= 0).all()  # in the order of the keys


def test_gaussian_entries_have_mean_zero_and_variance_one_over_r():
    r, m = 64, 4096
    x = projections.gaussian(r, m, rng=5) * math.sqrt(r)
    assert abs(x.mean()) * math.sqrt(x.size) < 4
    assert abs((x**2).mean() - 1) * math.sqrt(x.size / 2) < 4
    assert abs((x**4).mean() - 3) * math.sqrt(x.size / 96) < 4
    neighbours = x[:, 1:] * x[:, :-1]
    assert abs(neighbours.mean()) * math.sqrt(neighbours.size) < 4
    np.testing.assert_array_equal(
        projections.gaussian(3, 5, rng=1), projections.gaussian(3, 5, rng=1)
    )
    generator = np.random.default_rng(1)
    first = projections.gaussian(3, 5, rng=generator)
    np.testing.assert_array_equal(first, projections.gaussian(3, 5, rng=1))
    assert (projections.gaussian(3, 5, rng=generator) != first).any()


def test_gaussian_keeps_inner_products_on_average():
    """Mean x . y and variance (|x|^2 |y|^2 + (x . y)^2) / r, so deviation <= sqrt(2/r) |x| |y|."""
    rng = np.random.default_rng(7)
    x, y = rng.standard_normal((2, 20))
    r, draws = 5, 4000
    E = np.array([projections.gaussian(r, 20, rng=rng) for _ in range(draws)])
    products = ((E @ x) * (E @ y)).sum(axis=1)
    variance = (x @ x * (y @ y) + (x @ y) ** 2) / r
    assert abs(products.mean() - x @ y) < 4 * math.sqrt(variance / draws)
    # the fourth moment is at most that of a product of two chi-squares: 15 variances are ample
    assert abs(products.var() / variance - 1) < 4 * math.sqrt(15 / draws)
    assert variance <= 2 / r * (x @ x) * (y @ y)


@pytest.mark.parametrize(("m", "c"), [(9, 4), (4, 9), (6, 6), (1, 3)])
def test_svd_is_the_best_projection(m, c):
    """Eckart and Young: what is lost is the singular values from r + 1 on, and no less is."""
    rng = np.random.default_rng([m, c])
    x = rng.standard_normal((2, m, c))
    s = np.linalg.svd(x, compute_uv=False)
    for r in range(1, m + 1):
        E = projections.svd(x, r)
        assert E.shape == (2, r, m) and E.base is None
        eye = np.broadcast_to(np.eye(r), (2, r, r))
        np.testing.assert_allclose(E @ E.mT, eye, rtol=0, atol=50 * m * EPS)
        lost = x - E.mT @ (E @ x)
        slack = 50 * m * EPS * s.max()
        frobenius = np.sqrt((s[:, r:] ** 2).sum(axis=1))
        assert abs(np.linalg.norm(lost, axis=(1, 2)) - frobenius).max() <= slack
        spectral = s[:, r] if r < s.shape[1] else 0
        assert abs(np.linalg.norm(lost, 2, axis=(1, 2)) - spectral).max() <= slack
        other, _ = np.linalg.qr(rng.standard_normal((m, r)))
        worse = x - other @ (other.T @ x)
        assert (np.linalg.norm(worse, axis=(1, 2)) >= frobenius - slack).all()
        if r <= min(m, c):
            best = projections.low_rank(x, r)
            assert abs(best - E.mT @ (E @ x)).max() <= slack
            assert (np.linalg.matrix_rank(best) == r).all()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_factors_keep_the_dtype(dtype):
    x = np.random.default_rng(0).standard_normal((6, 3)).astype(dtype)
    assert projections.svd(x, 2).dtype == dtype and projections.low_rank(x, 2).dtype == dtype
    again = projections.low_rank(x, 3)
    assert abs(again.astype(float) - x).max() <= 50 * np.finfo(dtype).eps * abs(x).max()


def test_low_rank_keys_give_scores_of_that_rank():
    q, k, v, _ = draw(9, 8, 5, 2)
    scores = q @ projections.low_rank(k, 2).T
    assert np.linalg.matrix_rank(scores) == 2
    full = projections.low_rank(k, 5)
    assert (
        abs(refattn.softmax_attention(q, full, v) - refattn.softmax_attention(q, k, v)).max()
        < 1e-13
    )


def test_the_ranks_of_the_theorems():
    assert projections.theorem_1_rank(512, 0.1) == math.ceil(5 * math.log(512) / 0.009)
    assert projections.theorem_1_rank(1, 0.5) == 1
    doubled = [projections.theorem_1_rank(n, 0.2) for n in (10**3, 10**6)]
    assert abs(doubled[1] - 2 * doubled[0]) <= 1  # log n
    assert projections.theorem_2_rank(512, 64, 0.1) == math.ceil(500 * math.log(512))
    assert projections.theorem_2_rank(10**9, 2, 0.1) == math.ceil(1800 * math.log(2))
    assert projections.theorem_2_rank(10**12, 2, 0.1) == projections.theorem_2_rank(10**9, 2, 0.1)
    assert projections.theorem_2_rank(10**9, 1, 0.5) == 1
    # the first term wins where log n > 1.8 d log d
    edge = math.exp(1.8 * 3 * math.log(3))
    below, above = math.floor(edge) - 1, math.ceil(edge) + 1
    assert projections.theorem_2_rank(below, 3, 0.01) < projections.theorem_2_rank(above, 3, 0.01)
    assert projections.theorem_2_rank(above, 3, 0.01) == math.ceil(27 * math.log(3) / 0.01**2)


def test_the_proof_of_theorem_1_says_something_from_17_tokens_on():
    for n, says in ((16, False), (17, True)):
        k = 5 * math.log(n) / (0.5**2 - 0.5**3)
        failure = 2 * n * math.exp(-(0.5**2 - 0.5**3) * k / 4)
        assert math.isclose(failure, 2 * n**-0.25) and (failure < 1 - 1e-12) == says


# ---- errors

x, w = np.ones((4, 3)), np.ones((4, 2))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"E": np.ones(4)}, ValueError, [r"E has shape \(4,\)", r"\(\.\.\., r, m\)", "m = 4"]),
        ({"E": np.ones((2, 5))}, ValueError, [r"E has shape \(2, 5\)", "m = 4"]),
        ({"E": np.ones((2, 1))}, ValueError, [r"E has shape \(2, 1\)", "m = 4"]),
        ({"E": np.ones((0, 4))}, ValueError, ["E has 0 rows", "r >= 1"]),
        ({"E": np.ones((2, 2, 4))}, ValueError, [r"E has shape \(2, 2, 4\)", "broadcasts"]),
        ({"E": np.ones((2, 4), int)}, TypeError, ["E has dtype int64", "float32"]),
        ({"E": None}, TypeError, ["E has dtype object"]),
        ({"E": np.ones((2, 4)), "F": np.ones((3, 4))}, ValueError, ["E has 2 rows", "F has 3"]),
        ({"E": np.ones((2, 4)), "F": np.ones((2, 3))}, ValueError, [r"F has shape \(2, 3\)"]),
        ({"E": np.ones((2, 4)), "F": np.ones((2, 4), bool)}, TypeError, ["F has dtype bool"]),
        (
            {"E": np.ones((2, 4)), "key_mask": np.ones(4)},
            TypeError,
            ["key_mask", "float64", "bool"],
        ),
        ({"E": np.ones((2, 4)), "key_mask": np.ones(3, bool)}, ValueError, ["key_mask", r"\(3,\)"]),
        (
            {"E": np.ones((2, 4)), "key_mask": np.ones((2, 4), bool)},
            ValueError,
            ["key_mask", r"\(2, 4\)", r"\(4,\)"],
        ),
    ],
)
def test_options(options, error, words):
    with refused(error, *words):
        linformer(x, x, w, **options)
    with refused(error, *words):
        linformer_vjp(w, x, x, w, **options)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: projections.gaussian(5, 4, rng=0), ValueError, ["r is 5", "from 1 to 4"]),
        (lambda: projections.gaussian(0, 4, rng=0), ValueError, ["r is 0", "from 1 to 4"]),
        (lambda: projections.gaussian(2, 4, rng=None), TypeError, ["rng is None"]),
        (lambda: projections.mean_pool(5, 4), ValueError, ["r is 5", "from 1 to 4"]),
        (lambda: projections.mean_pool(2, 4.0), TypeError, ["m is 4.0"]),
        (lambda: projections.mean_pool(2, -1), ValueError, ["m is -1"]),
        (lambda: projections.svd(x, 5), ValueError, ["r is 5", "from 1 to 4"]),
        (lambda: projections.svd(np.ones(4), 1), ValueError, [r"x has shape \(4,\)"]),
        (lambda: projections.svd(np.ones((4, 3), int), 1), TypeError, ["x has dtype int64"]),
        (lambda: projections.low_rank(x, 4), ValueError, ["rank is 4", "from 1 to 3"]),
        (lambda: projections.theorem_1_rank(0, 0.5), ValueError, ["n is 0"]),
        (lambda: projections.theorem_1_rank(10, 1.0), ValueError, ["eps is 1.0", "< 1"]),
        (lambda: projections.theorem_1_rank(10, 0.0), ValueError, ["eps is 0.0", "> 0"]),
        (lambda: projections.theorem_2_rank(10, 0, 0.5), ValueError, ["d is 0"]),
        (lambda: projections.theorem_2_rank(10, 4, "x"), TypeError, ["eps is 'x'"]),
        (lambda: projections.theorem_2_rank(10, 4, 1.5), ValueError, ["eps is 1.5"]),
    ],
)
def test_projections_refuse(call, error, words):
    with refused(error, *words):
        call()


def test_no_keys_at_all():
    q, k, v, _ = draw(3, 0, 2, 4)
    y = linformer(q, k, v, E=np.ones((2, 0)))
    assert y.shape == (3, 4) and not y.any()
    dE = linformer_vjp(y, q, k, v, E=np.ones((2, 0)))[3]
    assert dE.shape == (2, 0)


def test_the_bound_holds_for_cancelling_projections():
    """Large E with cancelling rows: the projected keys round like their terms, not their sum."""
    q, k, v, rng = draw(7, 7, 4, 5)
    E = 1e6 + rng.standard_normal((3, 7))
    options = {"E": np.concatenate((E, -1e6 + rng.standard_normal((3, 7))), axis=1)}
    k, v = np.concatenate((k, k)), np.concatenate((v, v))
    truth = exact(LINFORMER.definition, q, k, v, options)
    error = abs(linformer(q, k, v, **options) - truth).max()
    assert 1e3 * EPS < error <= LINFORMER.tolerance(q, k, v, options, EPS)
