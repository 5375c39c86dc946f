"""From the arguments of a linear form to features and state, and from gradients back to them."""

import numpy as np

from refattn import checks
from refattn.arrays import sum_to_shape
from refattn.linear.feature_maps import feature_map_of


def features_of(feature_map, r, d):
    """The number of features, as told or as the map tells."""
    if r is not None:
        return checks.whole("r", r, least=1)
    if feature_map.width is None:
        raise ValueError("r is None and the feature map does not tell its width: give r")
    return feature_map.width(d)


def prepare(q, k, v, feature_map, causal, key_mask, initial_state, rows=None):
    """Checked inputs of a linear form: features, values and state, and what the gradient needs."""
    q, k, v, dtype = checks.qkv(q, k, v)
    n, m, lead = q.shape[-2], k.shape[-2], checks.lead(q, k, v)
    feature_map = feature_map_of(feature_map)
    if checks.flag("causal", causal):
        if rows is None and n != m:
            raise ValueError(
                f"causal linear attention came with n = {n}, m = {m}; it needs n = m "
                "(hand the past over as initial_state)"
            )
        if not feature_map.causal:
            raise ValueError(
                "this feature map's keys depend on all positions, so a causal form would see the "
                "future; expected causal=False, or another feature map"
            )
    seen = None
    if key_mask is not None:
        seen = checks.key_mask(key_mask, (*lead, m))[..., None]  # (..., m, 1)
        k, v = np.where(seen, k, feature_map.hidden), np.where(seen, v, 0)
        k, v = k.astype(q.dtype, copy=False), v.astype(q.dtype, copy=False)
    phi_q, phi_k = feature_map.query(q), feature_map.key(k)
    for name, phi, x in (("query", phi_q, q), ("key", phi_k, k)):
        if phi.shape[:-1] != x.shape[:-1] or phi.shape[-1] != phi_q.shape[-1]:
            wanted = (*x.shape[:-1], phi_q.shape[-1])
            raise ValueError(f"the feature map's {name} gave {phi.shape}; expected {wanted}")
    phi_q, phi_k = phi_q.astype(q.dtype, copy=False), phi_k.astype(q.dtype, copy=False)
    if seen is not None:
        phi_k = np.where(seen, phi_k, 0)
    shapes = (*lead, phi_q.shape[-1], v.shape[-1]), (*lead, phi_q.shape[-1])
    state = checks.state("initial_state", initial_state, shapes, q.dtype)
    return q, k, v, dtype, feature_map, seen, phi_q, phi_k, state


def of_every_head(state, lead):
    """(S, z) with all leading axes, as arrays of their own."""
    S, z = state
    S, z = np.broadcast_to(S, (*lead, *S.shape[-2:])), np.broadcast_to(z, (*lead, *z.shape[-1:]))
    return S.copy(), z.copy()


def cotangents(dy, dstate, inputs):
    """dy and dstate, checked; a dstate of zeros where none came."""
    q, k, v, dtype, *_, state = inputs
    lead = checks.lead(q, k, v)
    dy = checks.cotangent("dy", dy, (*lead, q.shape[-2], v.shape[-1]), dtype)
    if dstate is None:
        return dy, tuple(np.zeros_like(part) for part in state)
    names = ("dstate[0]", "dstate[1]")
    shapes = [(*lead, *state[0].shape[-2:]), (*lead, *state[1].shape[-1:])]
    if not isinstance(dstate, (tuple, list)) or len(dstate) != 2:
        raise TypeError(f"dstate is {type(dstate).__name__}; expected a pair (dS, dz)")
    parts = zip(names, dstate, shapes, strict=True)
    return dy, tuple(checks.cotangent(name, x, shape, q.dtype) for name, x, shape in parts)


def pull_back(grads, inputs, shapes, initial_state):
    """From the gradients of features, values and state to those of what came in."""
    q, k, v, dtype, feature_map, seen, *_ = inputs
    dphi_q, dphi_k, dv, dstate = grads
    if feature_map.query_vjp is None or feature_map.key_vjp is None:
        raise ValueError("the feature map has no query_vjp and key_vjp; its gradient needs both")
    if seen is not None:
        dphi_k, dv = np.where(seen, dphi_k, 0), np.where(seen, dv, 0)
    # phi_q = query(q), phi_k = key(k): on the rows as they came, before any broadcasting
    dq = feature_map.query_vjp(sum_to_shape(dphi_q, (*q.shape[:-1], dphi_q.shape[-1])), q)
    dphi_k = sum_to_shape(dphi_k, (*k.shape[:-1], dphi_k.shape[-1]))
    dk = feature_map.key_vjp(dphi_k, k)
    if seen is not None:
        dk = np.where(seen, dk, 0)
    grads = [sum_to_shape(g, s) for g, s in zip((dq, dk, dv), shapes, strict=True)]
    result = tuple(g.astype(dtype, copy=False) for g in grads)
    if initial_state is None:
        return result
    dS, dz = (sum_to_shape(g, np.shape(s)) for g, s in zip(dstate, initial_state, strict=True))
    return *result, (dS, dz)
