"""Kernels that know nothing of refattn."""

import numpy as np


def attention(q, k, v, causal=False, scale=None):
    """Softmax attention; a query that sees nothing gives 0. Computed in at least float32."""
    return (_weights(q, k, causal, scale) @ _wide(v)).astype(v.dtype)


def gradients(dy, q, k, v, causal=False, scale=None):
    """(dq, dk, dv) of ``attention``."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    p = _weights(q, k, causal, scale)
    dy, q, k, v, dtype = *map(_wide, (dy, q, k, v)), q.dtype
    dp = dy @ v.mT
    ds = factor * p * (dp - (p * dp).sum(axis=-1, keepdims=True))
    return tuple(g.astype(dtype) for g in (ds @ k, ds.mT @ q, p.mT @ dy))


def top_left(q, k, v, causal=False, scale=None):
    """Wrong where there are more keys than queries: query i sees keys up to i."""
    if causal:
        n = q.shape[-2]
        k, v = k[..., :n, :], v[..., :n, :]
    return attention(q, k, v, causal, scale)


def _weights(q, k, causal, scale):
    q, k = _wide(q), _wide(k)
    s = (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.mT)
    if causal:
        n, m = s.shape[-2:]
        s = np.where(np.tri(n, m, m - n, dtype=bool), s, -np.inf)
    top = s.max(axis=-1, keepdims=True)
    p = np.exp(s - np.where(np.isinf(top), 0, top))
    total = p.sum(axis=-1, keepdims=True)
    return p / np.where(total == 0, 1, total)


def _wide(x):
    return x if x.dtype == np.float64 else x.astype(np.float32)
