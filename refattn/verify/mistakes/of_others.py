"""Mistakes in linear forms, projections, blocks and gates, and those of any attention."""

import numpy as np

import refattn
from refattn.linear.feature_maps import feature_map_of
from refattn.verify.mistakes.base import (
    ALL,
    LINEAR,
    Mistake,
    changed,
    scale_of,
    without,
)


def _swapped(run, q, k, v, options):
    return run(q, v, k, **options) if k.shape == v.shape else None


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
    if not options.get("causal", run is refattn.linear_attention_chunked):
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
    if not options.get("causal", run is refattn.linear_attention_chunked):
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


def _parts_without_weights(run, q, k, v, options):
    if options.get("fuse") != "exact":
        return None
    block, scale = options["block"], options.get("scale")
    parts = range(0, len(k), block)
    ys = [
        refattn.softmax_attention(q, k[i : i + block], v[i : i + block], scale=scale) for i in parts
    ]
    return np.mean(ys, axis=0)


def _summaries_of_weight_one(run, q, k, v, options):
    """Two levels without log(size): a summary counts as one key."""
    block, n = options["block"], len(k)
    starts = np.arange(0, n, block)
    sizes = np.minimum(block, n - starts)
    if options.get("pool", "mean") == "mean":
        pooled = [np.add.reduceat(x, starts, axis=0) / sizes[:, None] for x in (k, v)]
    else:
        pooled = [np.maximum.reduceat(x, starts, axis=0) for x in (k, v)]
    place = np.arange(n) // block
    own = place[:, None] == place
    far = place[:, None] != np.arange(len(starts))
    keys, values = (np.concatenate([x, p]) for x, p in zip((k, v), pooled, strict=True))
    mask = np.concatenate([own, far], axis=1)
    return refattn.softmax_attention(q, keys, values, mask=mask, scale=options.get("scale"))


def _gate_inside(run, q, k, v, options):
    """The gate multiplies the queries, so it acts ahead of the softmax."""
    gate = np.asarray(options["gate"](q, k, v) if callable(options["gate"]) else options["gate"])
    if gate.ndim and gate.shape[-1] not in (1, q.shape[-1]):
        return None
    inner = options.get("attention", refattn.softmax_attention)
    rest = {key: x for key, x in options.items() if key not in ("gate", "attention")}
    return inner(gate * q, k, v, **rest)


def _ungated(run, q, k, v, options):
    inner = options.get("attention", refattn.softmax_attention)
    rest = {key: x for key, x in options.items() if key not in ("gate", "attention")}
    return inner(q, k, v, **rest)


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
    Mistake("keys and values swapped", "the call is (q, v, k)", ALL, _swapped),
    *(
        Mistake(
            "epsilon in the denominator",
            f"{epsilon:g} is added to phi(q) . z",
            LINEAR,
            _epsilon(epsilon),
        )
        for epsilon in (1e-6, 1e-4, 1e-3)
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
    Mistake(
        "blocks averaged without weights",
        "parts are averaged, not weighted with exp(lse_i - lse)",
        ("block_attention",),
        _parts_without_weights,
    ),
    Mistake(
        "summaries of weight one",
        "a pooled key counts as one key: log(size of its block) is missing",
        ("two_level_attention",),
        _summaries_of_weight_one,
    ),
    Mistake(
        "gate before the softmax",
        "the gate multiplies q, not the output",
        ("gated_attention",),
        _gate_inside,
    ),
    Mistake("gate ignored", "the output is not gated", ("gated_attention",), _ungated),
    Mistake("F ignored", "the values are projected with E", ("linformer_attention",), without("F")),
    Mistake(
        "key mask ignored",
        "hidden keys are seen",
        ("linformer_attention", "performer_attention", *LINEAR),
        without("key_mask"),
    ),
]
