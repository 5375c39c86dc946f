"""What is special to linear attention: its forms, its states, its feature maps."""

import numpy as np
import pytest

import refattn
from refattn.linear import FEATURE_MAPS, FeatureMap, steps
from refusals import refused

CAUSAL_MAPS = [name for name, feature_map in FEATURE_MAPS.items() if feature_map.causal]
rng = np.random.default_rng(0)
q, k, v, dy = rng.standard_normal((4, 2, 23, 5))
CLOSE = {"rtol": 1e-11, "atol": 1e-13}


@pytest.mark.parametrize("name", CAUSAL_MAPS)
def test_parallel_recurrent_and_chunked_forms_agree(name):
    y = refattn.linear_attention(q, k, v, feature_map=name, causal=True)
    np.testing.assert_allclose(steps.parallel(q, k, v, feature_map=name, causal=True), y, **CLOSE)
    np.testing.assert_allclose(steps.recurrent(q, k, v, feature_map=name), y, **CLOSE)
    for chunk in (1, 2, 7, 22, 23, 24, 1000):
        z = refattn.linear_attention_chunked(q, k, v, feature_map=name, chunk=chunk)
        np.testing.assert_allclose(z, y, **CLOSE)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_the_full_form_is_the_parallel_one(name):
    y = refattn.linear_attention(q, k, v, feature_map=name)
    np.testing.assert_allclose(steps.parallel(q, k, v, feature_map=name), y, **CLOSE)


@pytest.mark.parametrize("chunk", [None, 4])
def test_split_and_resume_at_every_cut(chunk):
    run = refattn.linear_attention if chunk is None else refattn.linear_attention_chunked
    options = {"causal": True} if chunk is None else {"chunk": chunk}
    whole, end = run(q, k, v, **options, return_state=True)
    for cut in range(24):
        head = [x[:, :cut] for x in (q, k, v)]
        tail = [x[:, cut:] for x in (q, k, v)]
        first, state = run(*head, **options, return_state=True)
        second, last = run(*tail, **options, initial_state=state, return_state=True)
        np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, **CLOSE)
        for a, b in zip(last, end, strict=True):
            np.testing.assert_allclose(a, b, **CLOSE)


def test_a_state_holds_the_keys_that_came_before():
    """Full attention over 23 keys, from those of the first 10 and a state of them."""
    whole = refattn.linear_attention(q, k, v)
    _, state = refattn.linear_attention(q, k[:, :10], v[:, :10], return_state=True)
    rest = refattn.linear_attention(q, k[:, 10:], v[:, 10:], initial_state=state)
    np.testing.assert_allclose(rest, whole, **CLOSE)


def test_a_state_has_all_leading_axes_and_is_the_callers():
    grouped = q[:, None], k[0], v[0]
    for run, options in (
        (refattn.linear_attention, {}),
        (refattn.linear_attention, {"causal": True}),
        (refattn.linear_attention_chunked, {}),
    ):
        y, (S, z) = run(*grouped, **options, return_state=True)
        assert y.shape == (2, 1, 23, 5) and S.shape == (2, 1, 5, 5) and z.shape == (2, 1, 5)
        S[:], z[:] = 0, 0  # arrays of their own


def test_the_step_does_not_write_to_its_state():
    _, state = refattn.linear_attention(q, k, v, causal=True, return_state=True)
    kept = [part.copy() for part in state]
    for part in state:
        part.setflags(write=False)
    y, new = refattn.linear_attention_step(state, q[:, 0], k[:, 0], v[:, 0])
    assert y.shape == (2, 5) and new[0].shape == state[0].shape
    for part, copy in zip(state, kept, strict=True):
        np.testing.assert_array_equal(part, copy)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_state_is_kept_in_the_dtype_of_the_arithmetic(dtype):
    low = [x.astype(dtype) for x in (q, k, v)]
    y, state = refattn.linear_attention(*low, causal=True, return_state=True)
    assert y.dtype == dtype and all(part.dtype == np.float32 for part in state)
    y, state = refattn.linear_attention_step(state, *(x[:, 0] for x in low))
    assert y.dtype == dtype and all(part.dtype == np.float32 for part in state)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk", [None, 4])
def test_gradient_of_the_state_by_differences(causal, chunk):
    """A loss that reads the state too, along random directions of every input."""
    gen = np.random.default_rng(1)
    names = ("linear_attention", "linear_attention_chunked")
    run, vjp = (getattr(refattn, names[chunk is not None] + end) for end in ("", "_vjp"))
    options = {"causal": causal} | ({} if chunk is None else {"chunk": chunk})
    start = gen.standard_normal((5, 5)), 1 + gen.random(5)
    dstate = gen.standard_normal((2, 5, 5)), gen.standard_normal((2, 5))
    inputs = [q, k, v, *start]
    moves = [gen.standard_normal(x.shape) for x in inputs]

    def loss(h):
        a, b, c, S, z = (x + h * u for x, u in zip(inputs, moves, strict=True))
        y, (S, z) = run(a, b, c, **options, initial_state=(S, z), return_state=True)
        return (y * dy).sum() + (S * dstate[0]).sum() + (z * dstate[1]).sum()

    *grads, state = vjp(dy, q, k, v, **options, initial_state=start, dstate=dstate)
    claimed = sum((g * u).sum() for g, u in zip([*grads, *state], moves, strict=True))
    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    assert abs(slope - claimed) < 1e-7 * (1 + abs(claimed))
    assert [part.shape for part in state] == [(5, 5), (5,)]


def test_taylor_features_give_the_start_of_the_exponential():
    phi = FEATURE_MAPS["taylor"]
    t = (q * k).sum(axis=-1)
    weights = (phi.query(q) * phi.key(k)).sum(axis=-1)
    np.testing.assert_allclose(weights, 1 + t + t**2 / 2, rtol=1e-13, atol=1e-13)
    assert phi.query(q).shape[-1] == phi.width(5) == 21


def test_the_slope_of_relu_at_zero_is_zero():
    phi = FEATURE_MAPS["relu"]
    np.testing.assert_array_equal(
        phi.query_vjp(np.ones(3), np.array([-1.0, 0.0, 2.0])), [0.0, 0.0, 1.0]
    )


def test_no_columns_of_values():
    for name in ("linear_attention", "linear_attention_chunked"):
        for causal in (False, True):
            y = getattr(refattn, name)(q, k, v[..., :0], causal=causal)
            assert y.shape == (2, 23, 0)
            grads = getattr(refattn, f"{name}_vjp")(y, q, k, v[..., :0], causal=causal)
            assert [g.shape for g in grads] == [q.shape, k.shape, (2, 23, 0)]


def test_bytes_and_workspace_by_hand():
    """n = 5, m = 4, d = r = 3, e = 2: 45 numbers in and out, 27 features, a state of 9."""
    cost = refattn.linear_attention_cost
    assert cost(5, 4, 3, 2).bytes == 4 * 45
    assert cost(5, 4, 3, 2).workspace == 4 * (27 + 9)
    assert cost(5, 4, 3, 2, initial_state=True, return_state=True).bytes == 4 * (45 + 18)
    assert cost(5, 4, 3, 2, return_state=True, itemsize=2).bytes == 2 * 45 + 4 * 9
    assert cost(5, 4, 3, 2, key_mask=3).bytes == 4 * 45 + 4
    chunked = refattn.linear_attention_chunked_cost(5, 5, 3, 2, chunk=64)
    assert chunked.workspace == 4 * (30 + 9 + 25)


def test_the_softmax_pair_needs_no_normaliser():
    """Each query's features sum to one, and so do each feature's keys."""
    y = refattn.linear_attention(q, k, v, feature_map="softmax")
    plain = refattn.linear_attention(q, k, v, feature_map="softmax", normalize=False)
    np.testing.assert_allclose(y, plain, **CLOSE)
    a = refattn.attention_matrix(refattn.linear_attention, q, k, feature_map="softmax")
    np.testing.assert_allclose(a.sum(axis=-1), 1, rtol=1e-13)
    assert (a > 0).all()


def test_a_denominator_of_zero_gives_zero():
    """relu of opposite signs: no query meets any key; no epsilon, no NaN."""
    y = refattn.linear_attention(abs(q), -abs(k), v, feature_map="relu")
    assert not y.any()
    grads = refattn.linear_attention_vjp(dy, abs(q), -abs(k), v, feature_map="relu")
    assert all(np.isfinite(g).all() for g in grads) and not grads[2].any()


def test_the_chapters_bare_query():
    """Q f(K) V as it is printed: (Q f(K)^T) V = Q (f(K)^T V)."""
    bare = FeatureMap(query=refattn.linear.identity, key=np.exp)
    y = refattn.linear_attention(q, k, v, feature_map=bare, normalize=False)
    np.testing.assert_allclose(y, (q @ np.exp(k).mT) @ v, rtol=1e-12, atol=1e-11)
    with refused(ValueError, "query_vjp", "key_vjp"):
        refattn.linear_attention_vjp(dy, q, k, v, feature_map=bare)


def test_hidden_keys_do_not_share_in_the_softmax_over_positions():
    seen = np.arange(23) % 3 > 0
    y = refattn.linear_attention(q, k, v, feature_map="softmax", key_mask=seen)
    without = refattn.linear_attention(q, k[:, seen], v[:, seen], feature_map="softmax")
    np.testing.assert_allclose(y, without, **CLOSE)


def test_a_mask_of_all_keys_gives_zero():
    for name in FEATURE_MAPS:
        y = refattn.linear_attention(q, k, v, feature_map=name, key_mask=np.zeros(23, bool))
        assert not y.any()


WIDE = FeatureMap(query=lambda x: x, key=lambda x: x[..., :2])
SHORT = FeatureMap(query=lambda x: x[..., :1, :], key=lambda x: x)
S, z = np.ones((5, 5)), np.ones(5)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"feature_map": "gelu"}, ValueError, ["feature_map is 'gelu'", "'elu', 'relu'"]),
        ({"feature_map": np.exp}, ValueError, ["feature_map is", "FeatureMap"]),
        ({"feature_map": WIDE}, ValueError, [r"key gave \(2, 23, 2\)", r"\(2, 23, 5\)"]),
        ({"feature_map": SHORT}, ValueError, [r"query gave \(2, 1, 5\)", r"\(2, 23, 5\)"]),
        ({"feature_map": "softmax", "causal": True}, ValueError, ["future", "causal=False"]),
        ({"causal": 1}, TypeError, ["causal is 1"]),
        ({"normalize": None}, TypeError, ["normalize is None"]),
        ({"return_state": 0}, TypeError, ["return_state is 0"]),
        ({"key_mask": np.ones(23)}, TypeError, ["key_mask has dtype float64", "bool"]),
        ({"key_mask": np.ones(22, bool)}, ValueError, ["key_mask has shape", r"\(22,\)"]),
        ({"key_mask": np.ones((3, 2, 23), bool)}, ValueError, ["key_mask has shape"]),
        ({"initial_state": S}, TypeError, ["initial_state is ndarray", "pair"]),
        ({"initial_state": (S[:4], z)}, ValueError, [r"S has shape \(4, 5\)", r"5, 5\)"]),
        ({"initial_state": (S, z[:4])}, ValueError, [r"z has shape \(4,\)"]),
        ({"initial_state": (S.astype(int), z)}, TypeError, ["S has dtype int64"]),
    ],
)
def test_errors(options, error, words):
    for run in (refattn.linear_attention, refattn.linear_attention_chunked):
        with refused(error, *words):
            run(q, k, v, **{"causal": False, **options})
    with refused(error, *words):
        refattn.linear_attention_vjp(dy, q, k, v, **options)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: refattn.linear_attention(q[:, 1:], k, v, causal=True),
            ValueError,
            ["n = 22, m = 23", "initial_state"],
        ),
        (lambda: refattn.linear_attention_chunked(q, k, v, chunk=0), ValueError, ["chunk is 0"]),
        (
            lambda: refattn.linear_attention_vjp(dy, q, k, v, dstate=(S, z)),
            ValueError,
            [r"dstate\[0\] has shape", r"\(2, 5, 5\)"],
        ),
        (
            lambda: refattn.linear_attention_vjp(dy, q, k, v, dstate=S),
            TypeError,
            ["dstate is ndarray", "pair"],
        ),
        (
            lambda: refattn.linear_attention_step(None, np.float64(1), z, z),
            ValueError,
            [r"q has shape \(\)"],
        ),
        (
            lambda: refattn.linear_attention_step((S[:2], z), z, z, z),
            ValueError,
            ["S has shape"],
        ),
        (
            lambda: refattn.linear_attention_cost(2, 2, 2, 2, feature_map=WIDE),
            ValueError,
            ["give r"],
        ),
    ],
)
def test_errors_of_calls(call, error, words):
    with refused(error, *words):
        call()
