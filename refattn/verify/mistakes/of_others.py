"""Mistakes in projections, blocks and gates, and those of any attention."""

import numpy as np

import refattn
from refattn.verify.mistakes.base import ALL, LINEAR, Mistake, without


def _swapped(run, q, k, v, options):
    return run(q, v, k, **options) if k.shape == v.shape else None


def _parts(combine):
    """Parts over blocks of keys, combined without exp(lse_i - lse)."""

    def output(run, q, k, v, options):
        if options.get("fuse") != "exact":
            return None
        block, scale = options["block"], options.get("scale")
        cuts = [slice(i, i + block) for i in range(0, len(k), block)]
        parts = [refattn.softmax_attention(q, k[cut], v[cut], scale=scale) for cut in cuts]
        return combine(parts, axis=0)

    return output


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
    Mistake("keys and values swapped", "the call is (q, v, k)", ALL, _swapped),
    Mistake(
        "blocks averaged without weights",
        "parts are averaged, not weighted with exp(lse_i - lse)",
        ("block_attention",),
        _parts(np.mean),
    ),
    Mistake(
        "blocks summed without weights",
        "parts are added, not weighted with exp(lse_i - lse)",
        ("block_attention",),
        _parts(np.sum),
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
