"""Mistakes in linear attention and Performer: features, running sums, denominators."""

import numpy as np

import refattn
from refattn.linear.core import divide
from refattn.linear.feature_maps import feature_map_of
from refattn.verify.mistakes.base import LINEAR, Mistake, changed, scale_of


def _epsilon(epsilon):
    """y times den / (den + epsilon)."""

    def output(run, q, k, v, options):
        if not options.get("normalize", True):
            return None
        num = run(q, k, v, **changed(options, normalize=False))
        den = run(q, k, np.ones((len(k), 1)), **changed(options, normalize=False))
        return num / (den + epsilon)

    return output


def _linear_strict(run, q, k, v, options):
    if not options.get("causal"):
        return None
    if options.get("key_mask") is not None or options.get("initial_state") is not None:
        return None
    num = run(q, k, v, **changed(options, normalize=False))
    den = run(q, k, np.ones((len(k), 1)), **changed(options, normalize=False))
    phi = feature_map_of(options.get("feature_map", "elu"))
    own = (phi.query(q) * phi.key(k)).sum(axis=1, keepdims=True)
    num, den = num - own * v, den - own
    if not options.get("normalize", True):
        return num
    den[0] = 0
    return np.where(den == 0, 0, num / np.where(den == 0, 1, den))


def _elu_without_one(run, q, k, v, options):
    if options.get("feature_map", "elu") != "elu":
        return None

    def elu(x):
        return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))

    bare = refattn.FeatureMap(query=elu, key=elu)
    return run(q, k, v, **changed(options, feature_map=bare))


def _future_seen(run, q, k, v, options):
    if not options.get("causal"):
        return None
    return run(q, k, v, **changed(options, causal=False))


def _performer_without_norms(run, q, k, v, options):
    """exp(omega x) without exp(-|x|^2 / 2)."""
    if options.get("kind", "positive") != "positive" or options.get("causal"):
        return None
    root, omega = scale_of(q, options) ** 0.5, options["omega"]
    a, b = root * q @ omega.T, root * k @ omega.T
    a, b = np.exp(a - a.max(axis=1, keepdims=True)), np.exp(b - b.max())
    if options.get("key_mask") is not None:
        b = np.where(np.asarray(options["key_mask"])[..., None], b, 0)
    return (a @ (b.T @ v)) / (a @ b.sum(axis=0))[:, None]


def _stabilised_by_all(epsilon):
    """phi_k = exp(omega k - |k|^2 / 2 - max of all omega k) + epsilon, in float32."""

    def output(run, q, k, v, options):
        if options.get("kind", "positive") != "positive" or options.get("key_mask") is not None:
            return None
        root, omega, features = scale_of(q, options) ** 0.5, options["omega"], []
        for x, axis in ((root * q, 1), (root * k, None)):
            t = x @ omega.T
            less = t - (x * x).sum(axis=1, keepdims=True) / 2 - t.max(axis=axis, keepdims=True)
            features.append(np.exp(less).astype(np.float32) + np.float32(epsilon))
        pairs = (features[0] @ features[1].T).astype(float)
        pairs = np.tril(pairs) if options.get("causal") else pairs
        return (pairs @ v) / pairs.sum(axis=1, keepdims=True)

    return output


def _one_added_last(divided):
    """In float32 expm1(x) + 1 keeps few digits of a small exp(x), and none below -17."""

    def output(run, q, k, v, options):
        if options.get("feature_map", "elu") != "elu" or not options.get("normalize", True):
            return None

        def phi(x):
            x = x.astype(np.float32)
            return (np.where(x > 0, x, np.expm1(np.minimum(x, 0))) + np.float32(1)).astype(float)

        options = changed(options, feature_map=refattn.FeatureMap(query=phi, key=phi))
        num = run(q, k, v, **changed(options, normalize=False))
        return divided(num, run(q, k, np.ones((len(k), 1)), **changed(options, normalize=False)))

    return output


def _own_value(run, q, k, v, options):
    """S_i = sum over features of phi(k_i) v_i: each query sees its own value alone."""
    causal = options.get("causal") and options.get("normalize", True)
    return v if causal and options.get("initial_state") is None else None


MISTAKES = [
    Mistake(
        "causal missing",
        "later keys are seen",
        ("softmax_attention", "local_attention", *LINEAR, "performer_attention"),
        _future_seen,
    ),
    Mistake(
        "strict causal",
        "a query does not see its own key: j < i instead of j <= i",
        LINEAR,
        _linear_strict,
    ),
    Mistake(
        "normaliser forgotten",
        "the output is not divided by phi(q) . z",
        LINEAR,
        lambda run, q, k, v, o: (
            run(q, k, v, **changed(o, normalize=False)) if o.get("normalize", True) else None
        ),
    ),
    *(
        Mistake(
            "epsilon in the denominator",
            f"{epsilon:g} is added to phi(q) . z",
            LINEAR,
            _epsilon(epsilon),
            number=f"{epsilon:g}",
        )
        for epsilon in (1e-10, 1e-6, 1e-4, 1e-3)
    ),
    *(
        Mistake(
            "one added after elu",
            f"expm1(x) + 1 loses what exp(x) has where x << 0: {left}",
            LINEAR,
            _one_added_last(divided),
        )
        for left, divided in (("0/0 is left", np.divide), ("rows of 0 are left", divide))
    ),
    Mistake(
        "running sum over the wrong axis",
        "the state is summed over the features, not over the positions: y = v",
        LINEAR,
        _own_value,
    ),
    Mistake(
        "elu without the one",
        "phi is elu, which may be negative, not elu + 1",
        LINEAR,
        _elu_without_one,
    ),
    Mistake(
        "feature norms missing",
        "phi is exp(omega x) without exp(-|x|^2 / 2)",
        ("performer_attention",),
        _performer_without_norms,
    ),
    *(
        Mistake(
            "epsilon in the features",
            f"{epsilon:g} is added to exp(. - the largest omega k of all), so later keys reach "
            "earlier queries, and far ones are buried",
            ("performer_attention",),
            _stabilised_by_all(epsilon),
            number=f"{epsilon:g}",
        )
        for epsilon in (1e-6, 1e-4)
    ),
    Mistake(
        "leak through a global maximum",
        "exponents are shifted by the largest of all keys: where it is far above a key's own, the "
        "features underflow to 0/0",
        ("performer_attention",),
        _stabilised_by_all(0),
    ),
]
