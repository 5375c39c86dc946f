"""Performer on the CPU: arguments as in ``formula``, the kernels those of linear attention.

Features are made block by block where they are used, by ``exponentials``; their shifts run along
with the keys.
"""

import numpy as np

from refattn import checks
from refattn.arrays import gradients
from refattn.kernels import heads_of, ready
from refattn.linear.groups import WIDTH
from refattn.linear.over_features import Inputs, attend, attend_vjp, nothing, start_state
from refattn.performer import formula
from refattn.performer.exponentials import POSITIVE, TRIG, Exponentials
from refattn.performer.features import PARTS, directions
from refattn.scalars import LN2, LOG2E


def performer_attention(
    q, k, v, *, omega, kind="positive", causal=False, key_mask=None, scale=None
):
    """``refattn.performer_attention``, block by block."""
    options = {"omega": omega, "kind": kind, "causal": causal, "key_mask": key_mask, "scale": scale}
    inputs, lead, dtype, shape = _inputs(q, k, v, **options)
    if nothing(inputs):
        return formula.performer_attention(q, k, v, **options)
    start = start_state(inputs.maps, inputs.heads.shape[:1], shape, inputs.v.dtype)
    y, finite, *_ = attend(inputs, start, causal, True)
    if not finite:  # a NaN, perhaps out of sight: 0 times NaN is NaN
        return formula.performer_attention(q, k, v, **options)
    return y.reshape(*lead, *y.shape[1:]).astype(dtype, copy=False)


def performer_attention_vjp(
    dy, q, k, v, *, omega, kind="positive", causal=False, key_mask=None, scale=None
):
    """``refattn.performer_attention_vjp``, features and weights computed again block by block."""
    options = {"omega": omega, "kind": kind, "causal": causal, "key_mask": key_mask, "scale": scale}
    inputs, lead, dtype, shape = _inputs(q, k, v, **options)
    H, n, e = len(inputs.heads), inputs.q.shape[1], inputs.v.shape[2]
    up = checks.cotangent("dy", dy, (*lead, n, e), dtype).reshape(H, n, e)
    if nothing(inputs):
        return formula.performer_attention_vjp(dy, q, k, v, **options)
    start = start_state(inputs.maps, (H,), shape, up.dtype)
    grads, _, finite = attend_vjp(up, inputs, start, causal, True, start[:2])
    if not finite:
        return formula.performer_attention_vjp(dy, q, k, v, **options)
    grads = [g.reshape(*lead, *g.shape[1:]) for g in grads]
    return gradients(grads, (np.shape(q), np.shape(k), np.shape(v)), dtype)


def _inputs(q, k, v, omega, kind, causal, key_mask, scale):
    """Checked inputs as kernels take them, leading shape, dtype, and the shape of S."""
    q, k, v, dtype = checks.qkv(q, k, v)
    n, m, lead = q.shape[-2], k.shape[-2], checks.lead(q, k, v)
    checks.choice("kind", kind, PARTS)
    omega = directions(omega, q.shape[-1], dtype)
    scale = checks.scale(scale, q.shape[-1])
    if scale <= 0:
        raise ValueError(f"scale is {scale}; Performer needs scale > 0, it takes its square root")
    if checks.flag("causal", causal):
        checks.square("causal Performer", n, m)
    seen = np.ones(0, bool)
    if key_mask is not None:
        seen = checks.key_mask(key_mask, (*lead, m))
    (*flat, seen), heads, lead = heads_of(q, k, v, seen[..., None, :])
    maps = maps_of(omega, kind, scale)
    return Inputs(*flat, seen[:, 0], heads, maps), lead, dtype, (maps.r, v.shape[-1])


def maps_of(omega, kind, scale):
    """sqrt(scale) omega, with what ``kind`` makes of it; hyperbolic features are the positive ones
    of omega and of -omega."""
    number = omega.dtype.type
    if kind == "trig":
        cut = range(0, len(omega), WIDTH // 2)  # cosines and sines of the same in one group
        W = scale**0.5 * np.concatenate([omega[i : i + WIDTH // 2] for i in cut for _ in range(2)])
        code, half, inner, outer = TRIG, 0.5 * scale * LOG2E, 1.0, scale
    else:
        W = np.concatenate([omega, -omega]) if kind == "hyperbolic" else omega
        W = scale**0.5 * LOG2E * W
        code, half, inner, outer = POSITIVE, -0.5 * scale * LOG2E, LN2, -scale
    W = ready(W.astype(omega.dtype, copy=False))
    groups = [W[r0 : r0 + WIDTH].T.reshape(-1) for r0 in range(0, len(W), WIDTH)]
    return Exponentials(
        code, len(W), W, np.concatenate(groups), number(half), number(inner), number(outer)
    )
