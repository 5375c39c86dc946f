"""Performer as statistics: unbiased, of the variance that lemma 2 says, and stable far out."""

import math

import numpy as np
import pytest

import refattn
from refattn.performer import kernel_variance
from refusals import refused

FEATURES = {
    "positive": refattn.positive_features,
    "hyperbolic": refattn.hyperbolic_features,
    "trig": refattn.trig_features,
}
DRAWS, M, D = 4000, 8, 4
x = np.array([0.4, -0.3, 0.5, 0.1])
y = np.array([0.2, 0.6, -0.1, 0.3])


def estimates(kind, orthogonal, a=x, b=y, draws=DRAWS):
    """phi(a) . phi(b) for many independent draws of omega."""
    rng = np.random.default_rng(17)
    phi, values = FEATURES[kind], np.empty(draws)
    for i in range(draws):
        omega = refattn.random_features(M, len(a), rng=rng, orthogonal=orthogonal)
        values[i] = phi(a, omega) @ phi(b, omega)
    return values


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("kind", FEATURES)
def test_unbiased(kind, orthogonal):
    """A z-test: the mean is within 4 standard errors of exp(x . y)."""
    values = estimates(kind, orthogonal)
    z = (values.mean() - math.exp(x @ y)) / (values.std(ddof=1) / math.sqrt(DRAWS))
    assert abs(z) < 4


@pytest.mark.parametrize("kind", FEATURES)
def test_variance_is_that_of_lemma_2(kind):
    """Of independent directions, within 4 standard errors of the sample variance."""
    values = estimates(kind, orthogonal=False)
    centred = (values - values.mean()) ** 2
    error = centred.std(ddof=1) / math.sqrt(DRAWS)
    assert abs(centred.mean() - kernel_variance(x, y, M, kind)) < 4 * error


@pytest.mark.parametrize("kind", FEATURES)
def test_orthogonal_directions_are_not_worse(kind):
    iid, orthogonal = (estimates(kind, flag) for flag in (False, True))
    assert orthogonal.var() < 1.05 * iid.var()


def test_variance_vanishes_with_the_kernel():
    """Positive features are best where exp(x . y) is small, trigonometric ones where x = y."""
    far = kernel_variance(2 * x, -2 * x, M, "positive")
    assert far == 0 < kernel_variance(2 * x, -2 * x, M, "trig")
    assert kernel_variance(x, x, M, "trig") == 0 < kernel_variance(x, x, M, "positive")
    assert kernel_variance(x, y, 2 * M) == pytest.approx(kernel_variance(x, y, M) / 2)
    with refused(ValueError, "kind is 'cosine'"):
        kernel_variance(x, y, M, "cosine")


def first_column_estimates(corrected):
    """E of the positive estimate with orthogonal directions from QR, with and without the signs."""
    d, draws = 8, 60_000
    rng = np.random.default_rng(5)
    a, b = np.zeros(d), np.zeros(d)
    a[0], b[0] = 1.0, 0.5
    Q, R = np.linalg.qr(rng.standard_normal((draws, d, d)))
    if corrected:
        Q = Q * np.where(np.diagonal(R, axis1=1, axis2=2) < 0, -1.0, 1.0)[:, None, :]
    norms = np.sqrt(rng.chisquare(d, (draws, d)))
    t = Q.mT[..., 0] * norms * (a[0] + b[0])  # omega . (a + b)
    values = np.exp(t - (a @ a + b @ b) / 2).mean(axis=1) / math.exp(a @ b)
    return values.mean(), values.std() / math.sqrt(draws), (Q[:, 0, 0] <= 0).mean()


def test_uncorrected_qr_is_biased_for_good():
    """Measured against the prediction (2 Phi(-1.5) + 7) / 8: row one is always on one side."""
    mean, error, one_sided = first_column_estimates(corrected=False)
    predicted = (math.erfc(1.5 / math.sqrt(2)) + 7) / 8
    assert one_sided == 1.0
    assert abs(predicted - 0.892) < 5e-4
    assert abs(mean - predicted) < 5 * error + 0.01 and mean < 0.9
    mean, error, one_sided = first_column_estimates(corrected=True)
    assert abs(mean - 1) < 4 * error and abs(one_sided - 0.5) < 0.01


def test_ours_has_the_signs_right():
    """The same pair through random_features: 1, where the uncorrected form has 0.89."""
    a, b = np.zeros(8), np.zeros(8)
    a[0], b[0] = 1.0, 0.5
    values = estimates("positive", True, a, b, draws=20_000) / math.exp(a @ b)
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - 1) < 4 * error < 0.05


@pytest.mark.parametrize("num_features", [1, 3, 4, 5, 11])
def test_orthogonal_in_blocks_with_chi_norms(num_features):
    omega = refattn.random_features(num_features, 4, rng=3)
    assert omega.shape == (num_features, 4)
    for start in range(0, num_features, 4):
        gram = omega[start : start + 4] @ omega[start : start + 4].T
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-12)


def test_norms_are_independent_and_chi_distributed():
    omega = refattn.random_features(40_000, 4, rng=4)
    squares = (omega**2).sum(axis=1)
    assert abs(squares.mean() - 4) < 4 * math.sqrt(8 / 40_000)
    assert abs(squares.var() - 8) < 0.5
    paired = np.corrcoef(squares[:-1:2], squares[1::2])[0, 1]
    assert abs(paired) < 4 / math.sqrt(20_000)


def test_omega_is_rounded_to_the_dtype_of_q():
    rng = np.random.default_rng(12)
    q, k, v = rng.standard_normal((3, 6, 4)).astype(np.float16)
    omega = refattn.random_features(8, 4, rng=rng)
    y = refattn.performer_attention(q, k, v, omega=omega)
    z = refattn.performer_attention(q, k, v, omega=omega.astype(np.float16))
    np.testing.assert_array_equal(y, z)


def test_the_same_seed_gives_the_same_directions():
    one, two = (refattn.random_features(5, 3, rng=9) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    generator = np.random.default_rng(9)
    np.testing.assert_array_equal(refattn.random_features(5, 3, rng=generator), one)


@pytest.mark.parametrize("kind", FEATURES)
def test_error_falls_with_the_root_of_the_number_of_features(kind):
    rng = np.random.default_rng(6)
    q, k, v = 0.5 * rng.standard_normal((3, 40, 4))
    exact = refattn.softmax_attention(q, k, v)
    counts, errors = [16, 64, 256, 1024], []
    for count in counts:
        runs = [
            refattn.performer_attention(
                q, k, v, omega=refattn.random_features(count, 4, rng=rng), kind=kind
            )
            for _ in range(12)
        ]
        errors.append(np.sqrt(np.mean([(run - exact) ** 2 for run in runs])))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -0.65 < slope < -0.35


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["positive", "hyperbolic"])
def test_far_from_the_origin(kind, causal):
    """Logits of hundreds: every exponent is far below zero, yet each row is a weighted mean."""
    rng = np.random.default_rng(7)
    q, k, v = 40 * rng.standard_normal((3, 24, 4))
    omega = refattn.random_features(64, 4, rng=rng)
    for dtype in (np.float64, np.float32):
        low = [a.astype(dtype) for a in (q, k, v)]
        out = refattn.performer_attention(*low, omega=omega, kind=kind, causal=causal)
        slack = 1e-4 * abs(v).max()
        assert np.isfinite(out).all()
        assert (out >= v.min(axis=0) - slack).all() and (out <= v.max(axis=0) + slack).all()
        grads = refattn.performer_attention_vjp(out, *low, omega=omega, kind=kind, causal=causal)
        assert all(np.isfinite(g).all() for g in grads)
    if causal:
        np.testing.assert_allclose(out[0], v[0], rtol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["positive", "hyperbolic"])
def test_hidden_keys_take_no_part_in_the_maximum(kind, causal):
    """A hidden key near the origin would win the maximum and make all far ones underflow."""
    rng = np.random.default_rng(11)
    q, k, v = 40 * rng.standard_normal((3, 6, 4))
    seen = np.array([0, 1, 1, 0, 1, 1], bool)
    k[~seen] = 1e200  # nor is it looked at
    options = {"omega": refattn.random_features(16, 4, rng=rng), "kind": kind}
    y = refattn.performer_attention(q, k, v, key_mask=seen, causal=causal, **options)
    for i in range(6):
        keys = seen & (np.arange(6) <= (i if causal else 6))
        one = refattn.performer_attention(q[i : i + 1], k[keys], v[keys], **options)
        np.testing.assert_allclose(y[i : i + 1], one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("factor", [1e5, 1e-5, np.nan])
@pytest.mark.parametrize("kind", FEATURES)
def test_later_keys_change_no_earlier_row(kind, factor):
    """Keys that grow a hundred-thousand-fold after row i: a global maximum would zero the rest."""
    rng = np.random.default_rng(8)
    q, k, v, dy = rng.standard_normal((4, 12, 4))
    omega = refattn.random_features(16, 4, rng=rng)
    options = {"omega": omega, "kind": kind, "causal": True}
    y = refattn.performer_attention(q, k, v, **options)
    dq = refattn.performer_attention_vjp(dy, q, k, v, **options)[0]
    for i in range(12):
        later = k.copy()
        later[i + 1 :] *= factor
        with np.errstate(over="ignore"):
            again = refattn.performer_attention(q, later, v, **options)
            dq_again = refattn.performer_attention_vjp(dy, q, later, v, **options)[0]
        np.testing.assert_array_equal(again[: i + 1], y[: i + 1])
        np.testing.assert_array_equal(dq_again[: i + 1], dq[: i + 1])


def test_equal_to_linear_attention_over_the_public_features():
    rng = np.random.default_rng(9)
    q, k, v = 0.3 * rng.standard_normal((3, 9, 4))
    omega = refattn.random_features(12, 4, rng=rng)
    for kind, phi in FEATURES.items():
        feature_map = refattn.FeatureMap(
            query=lambda a, phi=phi: phi(0.5**0.5 * a, omega),
            key=lambda a, phi=phi: phi(0.5**0.5 * a, omega),
        )
        for causal in (False, True):
            ours = refattn.performer_attention(q, k, v, omega=omega, kind=kind, causal=causal)
            theirs = refattn.linear_attention(q, k, v, feature_map=feature_map, causal=causal)
            np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", FEATURES)
def test_features_keep_the_dtype_and_have_the_columns_told(kind):
    omega = refattn.random_features(3, 4, rng=0)
    width = 3 if kind == "positive" else 6
    for dtype in (np.float64, np.float32, np.float16):
        phi = FEATURES[kind](np.ones((2, 5, 4), dtype), omega)
        assert phi.shape == (2, 5, width) and phi.dtype == dtype


ones, omega = np.ones((4, 3)), np.ones((2, 3))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"omega": omega[:, :2]}, ValueError, [r"omega has shape \(2, 2\)", "3"]),
        ({"omega": omega[:0]}, ValueError, [r"omega has shape \(0, 3\)", "num_features >= 1"]),
        ({"omega": omega[0]}, ValueError, [r"omega has shape \(3,\)"]),
        ({"omega": omega.astype(int)}, TypeError, ["omega has dtype int64"]),
        ({"omega": 1e300 * omega.astype(np.longdouble)}, TypeError, ["omega has dtype"]),
        ({"omega": omega, "kind": "cosine"}, ValueError, ["kind is 'cosine'", "'positive'"]),
        ({"omega": omega, "scale": 0.0}, ValueError, ["scale is 0.0", "> 0"]),
        ({"omega": omega, "scale": -1.0}, ValueError, ["scale is -1.0"]),
        ({"omega": omega, "causal": 1}, TypeError, ["causal is 1"]),
        ({"omega": omega, "key_mask": np.ones(3, bool)}, ValueError, ["key_mask has shape"]),
        ({"omega": omega, "key_mask": np.ones(4)}, TypeError, ["key_mask has dtype"]),
    ],
)
def test_errors(options, error, words):
    with refused(error, *words):
        refattn.performer_attention(ones, ones, ones, **options)
    with refused(error, *words):
        refattn.performer_attention_vjp(ones, ones, ones, ones, **options)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: refattn.performer_attention(ones[1:], ones, ones, omega=omega, causal=True),
            ValueError,
            ["n = 3, m = 4"],
        ),
        (lambda: refattn.random_features(0, 3, rng=0), ValueError, ["num_features is 0"]),
        (lambda: refattn.random_features(2, 0, rng=0), ValueError, ["d is 0"]),
        (lambda: refattn.random_features(2, 3, rng=None), TypeError, ["rng is None"]),
        (lambda: refattn.random_features(2, 3, rng=0, orthogonal=1), TypeError, ["orthogonal"]),
        (lambda: refattn.positive_features(np.ones(2), omega), ValueError, ["omega has shape"]),
        (lambda: refattn.trig_features(np.ones(3, int), omega), TypeError, ["x has dtype"]),
    ],
)
def test_errors_of_calls(call, error, words):
    with refused(error, *words):
        call()
