"""Linear attention on the CPU: arguments as in ``formula`` and ``chunked``."""

import numpy as np

from refattn import checks
from refattn.kernels import heads_of, ready
from refattn.linear import chunked, formula
from refattn.linear.feature_maps import (
    FEATURE_MAPS,
    FeatureMap,
    feature_map_of,
    identity,
    identity_vjp,
)
from refattn.linear.inputs import cotangents, prepare, pull_back
from refattn.linear.maps import ELU, READY, RELU, Plain
from refattn.linear.over_features import Inputs, attend, attend_vjp, nothing, start_state

# Maps that the kernels compute, so that the features of all positions are never held at once.
INSIDE = {id(FEATURE_MAPS["elu"]): ELU, id(FEATURE_MAPS["relu"]): RELU}
AS_IT_IS = FeatureMap(identity, identity, identity_vjp, identity_vjp)


def linear_attention(
    q,
    k,
    v,
    *,
    feature_map="elu",
    causal=False,
    normalize=True,
    key_mask=None,
    initial_state=None,
    return_state=False,
):
    """``refattn.linear_attention``, block by block."""
    checks.flag("return_state", return_state)
    options = {"feature_map": feature_map, "causal": causal, "normalize": normalize}
    options |= {"key_mask": key_mask, "initial_state": initial_state}
    found = _forward(q, k, v, **options)
    if found is None:
        return formula.linear_attention(q, k, v, **options, return_state=return_state)
    y, state = found
    return (y, state) if return_state else y


def linear_attention_vjp(
    dy,
    q,
    k,
    v,
    *,
    feature_map="elu",
    causal=False,
    normalize=True,
    key_mask=None,
    initial_state=None,
    return_state=False,
    dstate=None,
):
    """``refattn.linear_attention_vjp``, features and weights computed again block by block."""
    checks.flag("return_state", return_state)
    options = {"feature_map": feature_map, "causal": causal, "normalize": normalize}
    options |= {"key_mask": key_mask, "initial_state": initial_state}
    found = _backward(dy, q, k, v, **options, dstate=dstate)
    if found is None:
        return formula.linear_attention_vjp(dy, q, k, v, **options, dstate=dstate)
    return found


def linear_attention_chunked(
    q,
    k,
    v,
    *,
    feature_map="elu",
    causal=True,
    normalize=True,
    key_mask=None,
    initial_state=None,
    return_state=False,
    chunk=64,
):
    """``refattn.linear_attention_chunked``; the kernels' own blocks stand in for ``chunk``, since
    the answer does not depend on it."""
    checks.flag("return_state", return_state)
    checks.whole("chunk", chunk, least=1)
    options = {"feature_map": feature_map, "causal": causal, "normalize": normalize}
    options |= {"key_mask": key_mask, "initial_state": initial_state}
    found = _forward(q, k, v, **options)
    if found is None:
        options |= {"return_state": return_state, "chunk": chunk}
        return chunked.linear_attention_chunked(q, k, v, **options)
    y, state = found
    return (y, state) if return_state else y


def linear_attention_chunked_vjp(
    dy,
    q,
    k,
    v,
    *,
    feature_map="elu",
    causal=True,
    normalize=True,
    key_mask=None,
    initial_state=None,
    return_state=False,
    chunk=64,
    dstate=None,
):
    """``refattn.linear_attention_chunked_vjp``; see ``linear_attention_chunked``."""
    checks.flag("return_state", return_state)
    checks.whole("chunk", chunk, least=1)
    options = {"feature_map": feature_map, "causal": causal, "normalize": normalize}
    options |= {"key_mask": key_mask, "initial_state": initial_state, "dstate": dstate}
    found = _backward(dy, q, k, v, **options)
    if found is None:
        return chunked.linear_attention_chunked_vjp(dy, q, k, v, **options, chunk=chunk)
    return found


def linear_attention_step(state, q, k, v, *, feature_map="elu", normalize=True):
    """``refattn.linear_attention_step``: a causal form of one position."""
    options = {"feature_map": feature_map, "normalize": normalize}
    rows = [checks.floating(name, x) for name, x in zip("qkv", (q, k, v), strict=True)]
    found = None
    if all(x.ndim for x in rows):
        rows = (x[..., None, :] for x in rows)
        found = _forward(*rows, **options, causal=True, key_mask=None, initial_state=state)
    if found is None:
        return formula.linear_attention_step(state, q, k, v, **options)
    y, state = found
    return y[..., 0, :], state


def _forward(q, k, v, *, feature_map, causal, normalize, key_mask, initial_state):
    """y and the state; None where the formula must answer: nothing to compute, or a NaN, which may
    have been out of sight (0 times NaN is NaN)."""
    options = {"feature_map": feature_map, "causal": causal, "key_mask": key_mask}
    inputs, start, lead, prepared = _inputs(q, k, v, **options, initial_state=initial_state)
    checks.flag("normalize", normalize)
    if nothing(inputs):
        return None
    y, finite, S, z = attend(inputs, start, causal, normalize)
    if not finite:
        return None
    y = y.reshape(*lead, *y.shape[1:]).astype(prepared[3], copy=False)
    return y, (S.reshape(*lead, *S.shape[1:]), z.reshape(*lead, *z.shape[1:]))


def _backward(dy, q, k, v, *, feature_map, causal, normalize, key_mask, initial_state, dstate):
    """Gradients, or None as in ``_forward``."""
    options = {"feature_map": feature_map, "causal": causal, "key_mask": key_mask}
    inputs, start, lead, prepared = _inputs(q, k, v, **options, initial_state=initial_state)
    dy, dstate = cotangents(dy, dstate, prepared)
    checks.flag("normalize", normalize)
    if nothing(inputs):
        return None
    H, e = len(inputs.heads), dy.shape[-1]
    dstate = tuple(
        ready(np.broadcast_to(g, (*lead, *x.shape[1:]))).reshape(x.shape)
        for g, x in zip(dstate, (start.S, start.z), strict=True)
    )
    dy = dy.reshape(H, -1, e)
    grads, dstate, finite = attend_vjp(dy, inputs, start, causal, normalize, dstate)
    if not finite:
        return None
    dphi_q, dphi_k, dv, *dstate = (g.reshape(*lead, *g.shape[1:]) for g in (*grads, *dstate))
    shapes = np.shape(q), np.shape(k), np.shape(v)
    return pull_back((dphi_q, dphi_k, dv, dstate), prepared, shapes, initial_state)


def _inputs(q, k, v, feature_map, causal, key_mask, initial_state):
    """Checked inputs as kernels take them, the state before all keys, leading shape, and what
    ``prepare`` gave."""
    feature_map = feature_map_of(feature_map)
    kind, seen = INSIDE.get(id(feature_map), READY), np.ones(0, bool)
    if kind == READY:
        prepared = prepare(q, k, v, feature_map, causal, key_mask, initial_state)
    else:  # rows take the place of features, and hidden keys are the kernels' to leave out
        prepared = prepare(q, k, v, AS_IT_IS, causal, None, initial_state)
        if key_mask is not None:
            lead = checks.lead(*prepared[:3])
            seen = checks.key_mask(key_mask, (*lead, prepared[1].shape[-2]))
    _, _, v, *_, phi_q, phi_k, (S, z) = prepared
    (*flat, seen), heads, lead = heads_of(phi_q, phi_k, v, seen[..., None, :])
    maps = Plain(kind, phi_q.shape[-1])
    start = start_state(maps, heads.shape[:1], S.shape[-2:], v.dtype)
    start.S[:] = np.broadcast_to(S, (*lead, *S.shape[-2:])).reshape(start.S.shape)
    start.z[:] = np.broadcast_to(z, (*lead, *z.shape[-1:])).reshape(start.z.shape)
    return Inputs(*flat, seen[:, 0], heads, maps), start, lead, prepared
