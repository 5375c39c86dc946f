"""From the arguments of a linear form to features and state, and from gradients back to them."""

import numpy as np

from refattn import checks
from refattn.arrays import gradients, sum_to_shape
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
        if rows is None:
            checks.square("causal linear attention (the past is an initial_state)", n, m)
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


def keys_taken(rows):
    """How many keys the queries at these sorted positions can see, in a causal form."""
    return int(rows[-1]) + 1 if len(rows) else 0


def cost_up_to_last(cost):
    """The cost of some rows: a causal form takes no key after the last of them."""

    def of_rows(rows, n, m, d, e, *, causal=False, key_mask=None, **sizes):
        if checks.flag("causal", causal):
            if key_mask is not None and keys_taken(rows) < m:
                raise ValueError(
                    f"key_mask is a number, but only the first {keys_taken(rows)} keys are taken: "
                    f"give m = {keys_taken(rows)} and the visible ones among them"
                )
            m = keys_taken(rows)
        return cost(len(rows), m, d, e, causal=causal, key_mask=key_mask, **sizes)

    return of_rows


def up_to_last(rows, m, forward, vjp):
    """``forward`` and ``vjp`` without the keys after the last of the rows, which nobody sees."""
    stop = keys_taken(rows)

    def cut(k, v, options):
        mask = options.get("key_mask")
        if mask is not None:
            mask = checks.key_mask(mask, (*np.shape(mask)[:-1], m))[..., :stop]
            options = {**options, "key_mask": mask}
        return k[..., :stop, :], v[..., :stop, :], options

    def padded(g):
        rest = np.zeros((*g.shape[:-2], m - stop, g.shape[-1]), g.dtype)
        return np.concatenate([g, rest], axis=-2)

    def forward_of_rows(q, k, v, **options):
        k, v, options = cut(k, v, options)
        return forward(q, k, v, **options)

    def vjp_of_rows(dy, q, k, v, **options):
        k, v, options = cut(k, v, options)
        dq, dk, dv, *rest = vjp(dy, q, k, v, **options)
        return dq, padded(dk), padded(dv), *rest

    return forward_of_rows, vjp_of_rows


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
    result = gradients((dq, dk, dv), shapes, dtype)
    if initial_state is None:
        return result
    dS, dz = (sum_to_shape(g, np.shape(s)) for g, s in zip(dstate, initial_state, strict=True))
    return *result, (dS, dz)
