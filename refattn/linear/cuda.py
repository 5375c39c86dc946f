"""Linear attention on CUDA: arguments as in ``formula`` and ``chunked``.

Arrays of NumPy, or of another library that lie on a device. elu and relu are computed inside the
kernels. The features of "taylor" and "softmax" are array operations ahead of them; so are those of
a FeatureMap of one's own, whose callables are NumPy's: with arrays of another library it is
refused.
"""

import math

import numpy as np

from refattn import checks, gpu
from refattn.linear import formula
from refattn.linear.cuda_inputs import (
    by_formula,
    cotangents_of,
    given,
    gradients_of,
    work_of,
)
from refattn.linear.cuda_maps import READY
from refattn.linear.cuda_over_features import attend, attend_vjp, no_shifts
from refattn.linear.cuda_step import step


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
    """``refattn.linear_attention``, tile by tile."""
    checks.flag("return_state", return_state)
    options = {"feature_map": feature_map, "causal": causal, "normalize": normalize}
    options |= {"key_mask": key_mask, "initial_state": initial_state}
    y, state = _forward(q, k, v, **options)
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
    """``refattn.linear_attention_vjp``, features and weights computed again tile by tile."""
    checks.flag("return_state", return_state)
    options = {"feature_map": feature_map, "causal": causal, "normalize": normalize}
    options |= {"key_mask": key_mask, "initial_state": initial_state, "dstate": dstate}
    return _backward(dy, q, k, v, **options)


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
    """``refattn.linear_attention_chunked``; the kernels' own spans stand in for ``chunk``, since
    the answer does not depend on it."""
    checks.flag("return_state", return_state)
    checks.whole("chunk", chunk, least=1)
    options = {"feature_map": feature_map, "causal": causal, "normalize": normalize}
    options |= {"key_mask": key_mask, "initial_state": initial_state}
    y, state = _forward(q, k, v, **options)
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
    return _backward(dy, q, k, v, **options)


def linear_attention_step(state, q, k, v, *, feature_map="elu", normalize=True):
    """``refattn.linear_attention_step``: a causal form of one position."""
    gpu.require()
    rows = []
    for name, x in zip("qkv", (q, k, v), strict=True):
        shape = checks.floating(name, gpu.outline(x)).shape
        if not shape:
            raise ValueError(f"{name} has shape (); expected (..., {'e' if name == 'v' else 'd'})")
        rows.append((x if hasattr(x, "__dlpack__") else np.asarray(x))[..., None, :])
    options = {"feature_map": feature_map, "normalize": normalize, "initial_state": state}
    y, state = _forward(*rows, **options, causal=True, key_mask=None, token=True)
    return y[..., 0, :], state


def _forward(
    q, k, v, *, feature_map, causal, normalize, key_mask, initial_state, token=False
):  # fmt: skip
    """y, rounded, and the state."""
    found = given(q, k, v, feature_map, causal, key_mask, initial_state)
    normalize = checks.flag("normalize", normalize)
    if found.nothing:
        options = {"feature_map": feature_map, "causal": causal, "normalize": normalize}
        options |= {"key_mask": key_mask, "initial_state": initial_state, "return_state": True}
        y, state = by_formula(found, formula.linear_attention, **options)
        return gpu.cast(found.xp, y, found.dtype), state
    work, start = work_of(found)
    if token:
        y, state = step(work, start, normalize)
    else:
        y, _, state = attend(work, start, causal, normalize, no_shifts(work))
    xp, lead = found.xp, found.lead
    y, *state = (xp.reshape(x, (*lead, *x.shape[1:])) for x in (y, *state))
    return gpu.cast(xp, y, found.dtype), tuple(state)


def _backward(dy, q, k, v, *, feature_map, causal, normalize, key_mask, initial_state, dstate):
    """Gradients in the shapes of what came in."""
    found = given(q, k, v, feature_map, causal, key_mask, initial_state)
    H = math.prod(found.lead)
    up, sent = cotangents_of(found, dy, dstate, H)
    normalize = checks.flag("normalize", normalize)
    own = found.feature_map
    if found.of == READY and (own.query_vjp is None or own.key_vjp is None):
        raise ValueError("the feature map has no query_vjp and key_vjp; its gradient needs both")
    if found.nothing:
        options = {"feature_map": feature_map, "causal": causal, "normalize": normalize}
        options |= {"key_mask": key_mask, "initial_state": initial_state, "dstate": dstate}
        up = found.xp.reshape(up, (*found.lead, *up.shape[1:]))
        dq, dk, dv, *rest = by_formula(found, formula.linear_attention_vjp, up, **options)
        return *(gpu.cast(found.xp, g, found.dtype) for g in (dq, dk, dv)), *rest
    work, start = work_of(found)
    grads, first = attend_vjp(work, up, start, causal, normalize, sent, no_shifts(work))
    shapes = [np.shape(gpu.outline(x)) for x in (q, k, v)]
    return gradients_of(found, grads, first, shapes, initial_state)
