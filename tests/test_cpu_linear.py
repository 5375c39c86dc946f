"""Compiled linear attention and Performer: past one chunk and one segment, and far out."""

import functools

import ml_dtypes
import numba
import numpy as np
import pytest

import linear_forms
import refattn
from cases import MECHANISMS, flat, options_in
from linear_forms import attention, forms, wide
from mechanisms.performer import exponent_size
from refattn.linear import FeatureMap, identity, identity_vjp
from refattn.linear.over_features import segments
from refattn.linear.tiles import BLOCK

OMEGA = np.random.default_rng(0).standard_normal((70, 6))  # past half a group of sines
FORMS, FEW = forms(OMEGA)


def inputs(n, d=6, e=5, **more):
    """q, k, v and dy."""
    return linear_forms.inputs(n, d, e, **more)


run = functools.partial(linear_forms.run, backend="numba")
as_exact_as_the_formula = functools.partial(linear_forms.as_exact_as_the_formula, backend="numba")


@pytest.mark.parametrize("n", [BLOCK + 1, 200, 1025])
@pytest.mark.parametrize(("name", "options"), FORMS)
def test_past_a_block_and_a_segment(name, options, n):
    """1025 positions of one head are cut into segments."""
    assert len(segments(1025, 1)) > 2
    as_exact_as_the_formula(name, *inputs(n), **options)
    q, k, v, _ = inputs(n)
    exact = attention(name)[0](*map(wide, (q, k, v)), **options)
    y = attention(name)[0](q, k, v, backend="numba", **options)
    budget = MECHANISMS[name].tolerance(*map(wide, (q, k, v)), options, np.finfo(np.float32).eps)
    assert abs(y - exact).max() <= budget


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_float64(name, options):
    """The kernels' answer against the formula's, by the bound that both must keep."""
    q, k, v, dy = inputs(200, dtype=np.float64)
    found = run(name, q, k, v, dy, **options)
    plain = run(name, q, k, v, dy, backend="numpy", **options)
    eps = np.finfo(float).eps
    assert abs(found[0] - plain[0]).max() <= 2 * MECHANISMS[name].tolerance(q, k, v, options, eps)
    bound = MECHANISMS[name].gradient_tolerance(q, k, v, dy, options, eps)
    for g, p in zip(found[1:], plain[1:], strict=True):
        assert abs(g - p).max() <= min(2 * bound, 1e-7 * abs(p).max())


@pytest.mark.parametrize("features", [3, 128, 129, 300])
def test_numbers_of_features(features):
    """One group of columns, two, three; sines have twice as many."""
    omega = np.random.default_rng(2).standard_normal((features, 6))
    for kind in ("positive", "trig"):
        for causal in (False, True):
            options = {"omega": omega, "kind": kind, "causal": causal}
            as_exact_as_the_formula("performer_attention", *inputs(80), **options)


@pytest.mark.parametrize(("d", "e"), [(1, 1), (130, 3), (3, 140)])
def test_columns(d, e):
    for causal in (False, True):
        as_exact_as_the_formula("linear_attention", *inputs(70, d, e), causal=causal)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("name", "options"), FEW)
def test_half_types_are_computed_in_float32_and_rounded_once(name, options, dtype):
    half = [x.astype(dtype) for x in inputs(70)]
    options = options_in(options, dtype)
    found = run(name, *half, **options)
    single = run(name, *(x.astype(np.float32) for x in half), **options_in(options, np.float32))
    for x, s in zip(found, single, strict=True):
        assert x.dtype == dtype
        np.testing.assert_array_equal(x, s.astype(dtype))


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_grouped_heads(name, options):
    """Leading axes that broadcast: the same as copies, gradients summed over them."""
    q, _, _, dy = inputs(70, lead=(2, 1, 3))
    _, k, v, _ = inputs(70, lead=(2, 2, 1), seed=2)
    dy = np.concatenate([dy, -dy], axis=1)
    mask = np.random.default_rng(3).random((2, 1, 1, 70)) < 0.7
    full = [np.broadcast_to(x, (2, 2, 3, *x.shape[-2:])).copy() for x in (q, k, v)]
    y, dq, dk, dv = run(name, q, k, v, dy, key_mask=mask, **options)
    want, wq, wk, wv = run(name, *full, dy, key_mask=mask, **options)
    np.testing.assert_array_equal(y, want)
    wq, wk, wv = wq.sum(1, keepdims=True), wk.sum(2, keepdims=True), wv.sum(2, keepdims=True)
    for g, w in ((dq, wq), (dk, wk), (dv, wv)):
        assert g.shape == w.shape
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4 * abs(w).max())


def states(lead, r=6, e=5):
    rng = np.random.default_rng(4)
    S, z = rng.standard_normal((*lead, r, e)), 1 + rng.random((*lead, r))
    return S.astype(np.float32), z.astype(np.float32)


@pytest.mark.parametrize("lead", [(), (3,), (1,)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [70, 1025])
def test_states_and_their_gradients(n, causal, lead):
    q, k, v, dy = inputs(n, lead=(3,))
    first, dstate = states(lead), states((3,))
    kept = [x.copy() for x in first]
    options = {"initial_state": first, "causal": causal}
    y, state = refattn.linear_attention(q, k, v, return_state=True, backend="numba", **options)
    grads = refattn.linear_attention_vjp(dy, q, k, v, dstate=dstate, backend="numba", **options)
    up = {"initial_state": tuple(map(wide, first)), "causal": causal}
    arrays = [wide(x) for x in (q, k, v)]
    want, wanted = refattn.linear_attention(*arrays, return_state=True, **up)
    exact = refattn.linear_attention_vjp(wide(dy), *arrays, dstate=tuple(map(wide, dstate)), **up)
    pairs = zip(flat([y, state, *grads]), flat([want, wanted, *exact]), strict=True)
    for x, t in pairs:
        assert x.shape == t.shape and x.dtype == np.float32
        assert abs(x - t).max() <= 2e-4 * abs(t).max()  # sums of n terms that cancel
    for x, before in zip(first, kept, strict=True):
        np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("chunked", [False, True])
def test_split_and_resume(chunked):
    run = refattn.linear_attention_chunked if chunked else refattn.linear_attention
    q, k, v, _ = inputs(300, lead=(2,), dtype=np.float64)
    whole, last = run(q, k, v, causal=True, return_state=True, backend="numba")
    state, ys = None, []
    for part in (slice(0, 1), slice(1, 150), slice(150, 300)):
        rows = (x[:, part] for x in (q, k, v))
        y, state = run(*rows, causal=True, initial_state=state, return_state=True, backend="numba")
        ys.append(y)
    np.testing.assert_allclose(np.concatenate(ys, axis=1), whole, rtol=1e-11, atol=1e-12)
    for one, two in zip(state, last, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12)


def test_steps():
    q, k, v, _ = inputs(5, lead=(2, 3), dtype=np.float64)
    state = plain = None
    for i in range(5):
        token = [x[..., i, :] for x in (q, k, v)]
        y, state = refattn.linear_attention_step(state, *token, backend="numba")
        want, plain = refattn.linear_attention_step(plain, *token)
        np.testing.assert_allclose(y, want, rtol=1e-12)
        for one, two in zip(state, plain, strict=True):
            assert one.shape == two.shape
            np.testing.assert_allclose(one, two, rtol=1e-13)
    for bad in ((None, np.float64(1), q, q), ((q, q), *token)):
        words = []
        for backend in ("numpy", "numba"):
            with pytest.raises(ValueError, match="shape") as caught:
                refattn.linear_attention_step(*bad, backend=backend)
            words.append(str(caught.value))
        assert words[0] == words[1]


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one thread")
@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize(("name", "options"), FORMS)
def test_the_same_bits_for_any_number_of_threads_and_each_time(name, options, lead):
    arrays = inputs(1500, lead=lead)
    before = numba.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            numba.set_num_threads(threads)
            results.append(run(name, *arrays, **options))
    finally:
        numba.set_num_threads(before)
    for result in results[1:]:
        for x, y in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("name", "options"), FEW)
def test_read_only_and_strided_inputs(name, options):
    plain = inputs(70, lead=(2,))
    want = run(name, *plain, **options)
    strided = [np.asarray(np.repeat(x, 2, axis=-1)[..., ::2]) for x in plain]
    turned = [np.ascontiguousarray(x.mT).mT for x in plain]
    locked = [x.copy() for x in plain]
    for x in locked:
        x.flags.writeable = False
    for arrays in (strided, turned, locked):
        for x, w in zip(run(name, *arrays, **options), want, strict=True):
            np.testing.assert_array_equal(x, w)


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_nothing(name, options):
    for n, lead in ((0, ()), (0, (2,)), (3, (0,)), (3, (2, 0))):
        arrays = inputs(n, lead=lead)
        for x, y in zip(
            run(name, *arrays, **options),
            run(name, *arrays, backend="numpy", **options),
            strict=True,
        ):
            assert x.shape == y.shape and x.dtype == y.dtype


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize(("name", "options"), FORMS)
def test_a_key_that_is_not_a_number(name, options, poison):
    """Hidden, it is as if it were not there; else it stays with the queries that see it."""
    q, k, v, dy = inputs(70)
    bad_k, bad_v = k.copy(), v.copy()
    bad_k[40], bad_v[40] = poison, poison
    mask = np.arange(70) != 40
    clean = run(name, q, k, v, dy, key_mask=mask, **options)
    hidden = run(name, q, bad_k, bad_v, dy, key_mask=mask, **options)
    for x, c in zip(hidden, clean, strict=True):
        np.testing.assert_array_equal(x, c)
    assert not hidden[2][40].any() and not hidden[3][40].any()
    y = attention(name)[0](q, bad_k, bad_v, backend="numba", **options)
    plain = attention(name)[0](q, bad_k, bad_v, **options)
    np.testing.assert_array_equal(np.isfinite(y), np.isfinite(plain))
    if options["causal"]:
        np.testing.assert_allclose(y[:40], plain[:40], rtol=1e-6, atol=1e-6)
        assert not np.isfinite(y[40:]).any() or np.isinf(poison)


@pytest.mark.parametrize("name", ["linear_attention", "performer_attention"])
def test_no_visible_key(name):
    """Outputs and gradients 0: of all, and of the first queries of a causal form."""
    q, k, v, dy = inputs(200)
    options = {"omega": OMEGA} if name.startswith("perf") else {}
    for result in (
        run(name, q, k, v, dy, key_mask=np.zeros(200, bool), **options),
        run(name, q, k, v, dy, key_mask=np.zeros(200, bool), causal=True, **options),
    ):
        assert not any(x.any() for x in result)
    y, dq, dk, dv = run(name, q, k, v, dy, key_mask=np.arange(200) >= 100, causal=True, **options)
    assert not y[:100].any() and not dq[:100].any() and y[100:].all()
    assert not dk[:100].any() and not dv[:100].any() and dv[100:].all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["positive", "hyperbolic", "trig"])
def test_exponents_that_rise_faster_than_numbers_reach(kind, dtype):
    """Each key outweighs all before it by up to e^100, in features that then fall as fast."""
    rng = np.random.default_rng(5)
    n = 100
    omega = np.array([[60.0, 0.0], [0.0, 60.0], [40.0, 40.0], [-50.0, 10.0]]).astype(dtype)
    q = rng.standard_normal((n, 2)).astype(dtype)
    k = np.linspace(-20, 20, n)[:, None] * np.array([[1.0, 0.7]]) + rng.random((n, 2))
    k, v, dy = k.astype(dtype), *rng.standard_normal((2, n, 3)).astype(dtype)
    for causal in (False, True):
        options = {"omega": omega, "kind": kind, "causal": causal, "scale": 1.0}
        found = run("performer_attention", q, k, v, dy, **options)
        up = options_in(options, np.float64)
        arrays = [wide(x) for x in (q, k, v)]
        exact = run("performer_attention", *arrays, wide(dy), backend="numpy", **up)
        eps, mechanism = float(np.finfo(dtype).eps), MECHANISMS["performer_attention"]
        assert abs(found[0] - exact[0]).max() <= 2 * mechanism.tolerance(*arrays, up, eps)
        plain = run("performer_attention", q, k, v, dy, backend="numpy", **options)
        bound = 64 * eps * exponent_size(*arrays[:2], up)
        pull = abs(omega).max() * (abs(dy) @ abs(v).T).max()  # the terms that cancel in dq and dk
        for x, t, p in zip(found, exact, plain, strict=True):
            assert abs(x - t).max() <= bound * (abs(t).max() + pull) + 8 * abs(p - t).max()
        assert found[0].any(axis=-1).all()


@pytest.mark.parametrize("kind", ["positive", "trig"])
def test_a_later_key_however_large_changes_nothing_before(kind):
    q, k, v, dy = inputs(200)
    options = {"omega": OMEGA, "kind": kind, "causal": True, "backend": "numba"}
    y = refattn.performer_attention(q, k, v, **options)
    dq = refattn.performer_attention_vjp(dy, q, k, v, **options)[0]
    for factor in (30.0, 1e4, 1e18):
        later_k, later_v = k.copy(), v.copy()
        later_k[150:] *= factor
        later_v[150:] *= factor
        again = refattn.performer_attention(q, later_k, later_v, **options)
        np.testing.assert_allclose(again[:150], y[:150], rtol=1e-4, atol=1e-5)
        again = refattn.performer_attention_vjp(dy, q, later_k, later_v, **options)[0]
        np.testing.assert_allclose(again[:150], dq[:150], rtol=1e-3, atol=1e-4)


def test_elu_far_below_zero():
    """exp(-95) is below the normal numbers of float32, and all that such a query has."""
    q, k, v, _ = inputs(70)
    for causal in (False, True):
        y = refattn.linear_attention(q - 95, k, v, causal=causal, backend="numba")
        want = refattn.linear_attention(wide(q - 95), wide(k), wide(v), causal=causal)
        assert abs(y - want).max() < 0.01  # features of a few hundred units of the last place
        y = refattn.linear_attention(q - 75, k - 5, v, causal=causal, backend="numba")
        want = refattn.linear_attention(wide(q - 75), wide(k - 5), wide(v), causal=causal)
        assert abs(y - want).max() < 1e-4


def test_a_map_of_ones_own_and_softmax():
    bare = FeatureMap(identity, np.exp, identity_vjp, lambda dphi, k: dphi * np.exp(k))
    mask = np.arange(300) % 3 > 0
    for options in (
        {"feature_map": bare, "normalize": False},
        {"feature_map": bare, "normalize": False, "causal": True, "key_mask": mask},
        {"feature_map": "softmax"},
        {"feature_map": "softmax", "key_mask": mask},
    ):
        as_exact_as_the_formula("linear_attention", *inputs(300), **options)


def test_the_chunk_is_checked_and_changes_nothing():
    q, k, v, dy = inputs(100)
    want = run("linear_attention", q, k, v, dy, causal=True)
    for chunk in (1, 64, 1000):
        for x, w in zip(
            run("linear_attention_chunked", q, k, v, dy, chunk=chunk), want, strict=True
        ):
            np.testing.assert_array_equal(x, w)
    with pytest.raises(ValueError, match="chunk is 0"):
        refattn.linear_attention_chunked(q, k, v, chunk=0, backend="numba")


S, z = np.ones((6, 5)), np.ones(6)


@pytest.mark.parametrize(
    "options",
    [
        {"initial_state": S},
        {"initial_state": (S[:4], z)},
        {"initial_state": (S, z[:4])},
        {"initial_state": (S.astype(int), z)},
        {"key_mask": np.ones(4)},
        {"key_mask": np.ones(3, bool)},
        {"key_mask": np.ones((2, 4), bool)},
        {"feature_map": "softmax", "causal": True},
        {"normalize": None},
        {"return_state": 0},
        {"dstate": S},
        {"dstate": (S[:2], z)},
        {"feature_map": FeatureMap(identity, identity)},
    ],
)
def test_refused_in_the_same_words(options):
    q, k, v, dy = inputs(4, dtype=np.float64)
    vjp_only = "dstate" in options or isinstance(options.get("feature_map"), FeatureMap)
    forms = ("linear_attention", "linear_attention_chunked")
    for name in forms if options.get("feature_map") != "softmax" else forms[:1]:
        words = []
        for backend in ("numpy", "numba"):
            forward, vjp = attention(name)
            run, first = (vjp, (dy,)) if vjp_only else (forward, ())
            with pytest.raises((TypeError, ValueError)) as caught:
                run(*first, q, k, v, backend=backend, **options)
            words.append((caught.type, str(caught.value)))
        assert words[0] == words[1]
