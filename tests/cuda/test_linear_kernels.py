"""Linear attention and Performer as CUDA kernels, cut small: past tiles and spans, and far out.

Only in the simulator, where a block of four threads may be had."""

import functools

import ml_dtypes
import numpy as np
import pytest

import linear_forms
import refattn
import simulator
from cases import MECHANISMS, flat, options_in
from linear_forms import attention, forms, wide
from mechanisms.performer import exponent_size
from refattn.linear.cuda_maps import SIZES, Sizes
from refattn.performer.cuda_shifts import most

OMEGA = np.random.default_rng(0).standard_normal((5, 3))  # more than a tile's columns
FORMS, FEW = forms(OMEGA)
N = 19  # three spans, the last of less than a tile; two cuts of the keys in the full form


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles of 4 by 4, four threads a block, spans of two tiles."""
    for kind in SIZES:
        monkeypatch.setitem(SIZES, kind, Sizes(4, 2, 4, 2, 8))


def inputs(n=N, d=3, e=5, **more):
    """q, k, v and dy."""
    return linear_forms.inputs(n, d, e, **more)


run = functools.partial(linear_forms.run, backend="cuda")
as_exact_as_the_formula = functools.partial(linear_forms.as_exact_as_the_formula, backend="cuda")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "options"), FORMS)
def test_past_a_tile_and_a_span(name, options, dtype):
    as_exact_as_the_formula(name, *inputs(dtype=dtype), **options)


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_grouped_heads_and_masks(name, options):
    """Leading axes that broadcast: gradients are summed over them."""
    q, _, _, dy = inputs(9, lead=(2, 1, 2))
    _, k, v, _ = inputs(9, lead=(2, 2, 1), seed=2)
    dy = np.concatenate([dy, -2 * dy], axis=1)
    mask = np.random.default_rng(3).random((2, 1, 1, 9)) < 0.7
    as_exact_as_the_formula(name, q, k, v, dy, key_mask=mask, **options)


@pytest.mark.parametrize(("n", "m", "d", "e"), [(1, 1, 1, 1), (3, 21, 1, 9), (21, 3, 9, 1)])
def test_sizes(n, m, d, e):
    q, *_, dy = inputs(n, d, e)
    _, k, v, _ = inputs(m, d, e)
    as_exact_as_the_formula("linear_attention", q, k, v, dy)
    omega = np.random.default_rng(2).standard_normal((1, d))
    as_exact_as_the_formula("performer_attention", q, k, v, dy, omega=omega)


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("causal", [False, True])
def test_states_and_their_gradients(causal, lead):
    rng = np.random.default_rng(4)
    arrays = inputs(lead=(2,), dtype=np.float64)
    first = rng.standard_normal((*lead, 3, 5)), 1 + rng.random((*lead, 3))
    dstate = rng.standard_normal((2, 3, 5)), rng.standard_normal((2, 3))
    kept = [x.copy() for x in first]
    found, wanted = [], []
    for results, backend in ((found, "cuda"), (wanted, "numpy")):
        options = {"initial_state": first, "causal": causal, "backend": backend}
        q, k, v, dy = arrays
        results += flat(refattn.linear_attention(q, k, v, return_state=True, **options))
        results += flat(refattn.linear_attention_vjp(dy, q, k, v, dstate=dstate, **options))
    for x, w in zip(flat(found), flat(wanted), strict=True):
        assert x.shape == w.shape
        np.testing.assert_allclose(x, w, rtol=1e-12, atol=1e-12 * abs(w).max())
    for x, before in zip(first, kept, strict=True):
        np.testing.assert_array_equal(x, before)


def test_split_and_resume_and_steps():
    q, k, v, _ = inputs(lead=(2,), dtype=np.float64)
    whole, last = refattn.linear_attention(q, k, v, causal=True, return_state=True)
    state, ys = None, []
    for part in (slice(0, 1), slice(1, 12), slice(12, 18)):
        rows = (x[:, part] for x in (q, k, v))
        options = {"initial_state": state, "return_state": True, "backend": "cuda"}
        y, state = refattn.linear_attention_chunked(*rows, chunk=5, **options)
        ys.append(y)
    token = [x[:, 18] for x in (q, k, v)]
    y, state = refattn.linear_attention_step(state, *token, backend="cuda")
    ys.append(y[:, None])
    np.testing.assert_allclose(np.concatenate(ys, axis=1), whole, rtol=1e-11, atol=1e-12)
    for one, two in zip(state, last, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12)
    for bad in ((None, np.float64(1), q, q), ((q, q), *token)):
        words = []
        for backend in ("numpy", "cuda"):
            with pytest.raises(ValueError, match="shape") as caught:
                refattn.linear_attention_step(*bad, backend=backend)
            words.append(str(caught.value))
        assert words[0] == words[1]


@pytest.mark.parametrize(
    "options", [{}, {"feature_map": "relu"}, {"feature_map": "taylor"}, {"normalize": False}]
)
def test_a_step_of_many_heads_and_columns(options):
    """Past a block's columns; heads share keys; the state that came in is not written to."""
    rng = np.random.default_rng(7)
    q, k, v = (rng.standard_normal(s) for s in ((2, 2, 2), (2, 1, 2), (2, 1, 70)))
    r = 6 if options.get("feature_map") == "taylor" else 2
    state = rng.standard_normal((2, 1, r, 70)), rng.random((r,))
    kept = [x.copy() for x in state]
    for given in (None, state):
        y, (S, z) = refattn.linear_attention_step(given, q, k, v, backend="cuda", **options)
        want, (wanted_S, wanted_z) = refattn.linear_attention_step(given, q, k, v, **options)
        for x, w in ((y, want), (S, wanted_S), (z, wanted_z)):
            assert x.shape == w.shape
            np.testing.assert_allclose(x, w, rtol=1e-11, atol=1e-12)
    for x, before in zip(state, kept, strict=True):
        np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("name", "options"), FEW)
def test_half_types_are_computed_in_float32_and_rounded_once(name, options, dtype):
    half = [x.astype(dtype) for x in inputs(9)]
    options = options_in(options, dtype)
    found = run(name, *half, **options)
    single = run(name, *(x.astype(np.float32) for x in half), **options_in(options, np.float32))
    for x, s in zip(found, single, strict=True):
        assert x.dtype == dtype
        np.testing.assert_array_equal(x, s.astype(dtype))


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_the_same_bits_in_any_order_of_threads_and_memory(name, options):
    """Strided, read-only inputs, and a seed that draws which thread comes next."""
    plain = inputs(lead=(1,))
    with simulator.seed(11):
        want = run(name, *plain, **options)
    locked = [np.asarray(np.repeat(x, 2, axis=-1)[..., ::2]) for x in plain]
    for x in locked:
        x.flags.writeable = False
    with simulator.seed(12):
        for x, w in zip(run(name, *locked, **options), want, strict=True):
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
    state = np.ones((3, 5)), np.ones(3)
    q, k, v, _ = inputs(2, dtype=np.float64)
    if name == "linear_attention" and not options["causal"]:
        few = {**options, "initial_state": state}
        if options.get("feature_map") != "taylor":
            y = refattn.linear_attention(q, k[:0], v[:0], backend="cuda", **few)
            np.testing.assert_allclose(y, refattn.linear_attention(q, k[:0], v[:0], **few))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize(("name", "options"), FORMS)
def test_a_key_that_is_not_a_number(name, options, poison):
    """Hidden, it is as if it were not there; else it stays with the queries that see it."""
    q, k, v, dy = inputs()
    bad_k, bad_v = k.copy(), v.copy()
    bad_k[10], bad_v[10] = poison, poison
    mask = np.arange(N) != 10
    clean = run(name, q, k, v, dy, key_mask=mask, **options)
    hidden = run(name, q, bad_k, bad_v, dy, key_mask=mask, **options)
    for x, c in zip(hidden, clean, strict=True):
        np.testing.assert_array_equal(x, c)
    assert not hidden[2][10].any() and not hidden[3][10].any()
    with np.errstate(invalid="ignore", over="ignore"):
        found = run(name, q, bad_k, bad_v, dy, **options)
    plain = attention(name)[0](q, bad_k, bad_v, **options)
    np.testing.assert_array_equal(np.isfinite(found[0]), np.isfinite(plain))
    if options["causal"]:
        good = run(name, q, k, v, dy, **options)
        for x, c in zip(found[:2], good[:2], strict=True):  # y and dq of the queries before it
            np.testing.assert_allclose(x[:10], c[:10], rtol=1e-5, atol=1e-6)
        assert not np.isfinite(found[0][10:]).any() or np.isinf(poison)


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_a_query_that_is_not_a_number(name, options):
    q, k, v, dy = inputs()
    bad = q.copy()
    bad[10] = np.nan
    good = run(name, q, k, v, dy, **options)
    with np.errstate(invalid="ignore"):
        found = run(name, bad, k, v, dy, **options)
    others = np.arange(N) != 10
    for x, c in zip(found[:2], good[:2], strict=True):
        np.testing.assert_array_equal(x[others], c[others])
    assert np.isnan(found[0][10]).all()
    if options["causal"]:
        for x, c in zip(found[2:], good[2:], strict=True):
            np.testing.assert_allclose(x[11:], c[11:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), FEW)
def test_no_visible_key(name, options):
    """Outputs and gradients 0: of all, and of the first queries of a causal form."""
    q, k, v, dy = inputs()
    assert not any(x.any() for x in run(name, q, k, v, dy, key_mask=np.zeros(N, bool), **options))
    if options["causal"]:
        y, dq, dk, dv = run(name, q, k, v, dy, key_mask=np.arange(N) >= 11, **options)
        assert not y[:11].any() and not dq[:11].any() and y[11:].all()
        assert not dk[:11].any() and not dv[:11].any() and dv[11:].all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["positive", "hyperbolic", "trig"])
def test_exponents_that_rise_faster_than_numbers_reach(kind, dtype, causal):
    """Each key outweighs all before it by up to e^600, in features that then fall as fast."""
    rng = np.random.default_rng(5)
    omega = np.array([[60.0, 0.0], [0.0, 60.0], [40.0, 40.0], [-50.0, 10.0]]).astype(dtype)
    q = rng.standard_normal((N, 2)).astype(dtype)
    k = np.linspace(-20, 20, N)[:, None] * np.array([[1.0, 0.7]]) + rng.random((N, 2))
    v, dy = rng.standard_normal((2, N, 3)).astype(dtype)
    k = k.astype(dtype)
    exponents = (k @ omega.T - (k * k).sum(1, keepdims=True) / 2)[:8]  # of a span
    assert (exponents.max(0) - exponents[0] > most(dtype)).any()  # so pairs go by themselves
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
    q, k, v, dy = inputs()
    options = {"omega": OMEGA, "kind": kind, "causal": True}
    y, dq, *_ = run("performer_attention", q, k, v, dy, **options)
    for factor in (30.0, 1e4, 1e18):
        later_k, later_v = k.copy(), v.copy()
        later_k[13:] *= factor
        later_v[13:] *= factor
        again = run("performer_attention", q, later_k, later_v, dy, **options)
        np.testing.assert_allclose(again[0][:13], y[:13], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(again[1][:13], dq[:13], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_elu_far_below_zero(causal):
    """exp(-95) is below the normal numbers of float32, and all that such a query has."""
    q, k, v, _ = inputs()
    y = refattn.linear_attention(q - 95, k, v, causal=causal, backend="cuda")
    want = refattn.linear_attention(wide(q - 95), wide(k), wide(v), causal=causal)
    assert abs(y - want).max() < 0.01  # features of a few hundred units of the last place
    y = refattn.linear_attention(q - 75, k - 5, v, causal=causal, backend="cuda")
    want = refattn.linear_attention(wide(q - 75), wide(k - 5), wide(v), causal=causal)
    assert abs(y - want).max() < 1e-4
