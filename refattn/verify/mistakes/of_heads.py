"""Mistakes that mix heads: they show where there is more than one."""

import numpy as np

from refattn.linear.feature_maps import feature_map_of
from refattn.verify.mistakes.base import ALL, LINEAR, Mistake

FIXED = ("sparse_attention", "linformer_attention", "gated_attention")  # to n, by an option


def _swapped(run, q, k, v, options):
    """b h n d read as b n h d: each token attends over the heads."""
    if q.ndim != 4 or q.shape != k.shape:
        return None
    q, k, v = (x.swapaxes(-3, -2) for x in (q, k, v))
    return run(q, k, v, **options).swapaxes(-3, -2)


def _reshaped(run, q, k, v, options):
    """Memory of b n h d taken for b h n d: reshaped where it should have been transposed."""
    if q.ndim != 4:
        return None
    torn = [x.swapaxes(1, 2).reshape(x.shape) for x in (q, k, v)]
    y = run(*torn, **options)
    b, h, n, e = y.shape
    return y.reshape(b, n, h, e).swapaxes(1, 2)


def _first_head_of_keys(run, q, k, v, options):
    if q.ndim != 4:
        return None
    return run(q, k[:, :1], v[:, :1], **options)


def _over_heads(run, q, k, v, options):
    """Running sums over the axis ahead of the tokens."""
    if q.ndim != 4 or not options.get("causal", True) or options.get("key_mask") is not None:
        return None
    phi = feature_map_of(options.get("feature_map", "elu"))
    q, k = phi.query(q), phi.key(k)
    S = np.cumsum(k[..., :, None] * v[..., None, :], axis=1)
    num = (q[..., None, :] @ S)[..., 0, :]
    if not options.get("normalize", True):
        return num
    return num / (q * np.cumsum(k, axis=1)).sum(axis=-1, keepdims=True)


MISTAKES = [
    Mistake(
        "heads and tokens swapped",
        "each token attends over the heads: the axes are read in the other order",
        tuple(name for name in ALL if name not in FIXED),
        _swapped,
        across_heads=True,
    ),
    Mistake(
        "heads reshaped",
        "tokens and heads are torn apart by a reshape where a transpose is needed",
        ALL,
        _reshaped,
        across_heads=True,
    ),
    Mistake(
        "one head of keys for all",
        "every head attends to the keys and values of head 0",
        ALL,
        _first_head_of_keys,
        across_heads=True,
    ),
    Mistake(
        "running sum over heads",
        "the state is summed over the heads, not over the positions",
        LINEAR,
        _over_heads,
        across_heads=True,
    ),
]
