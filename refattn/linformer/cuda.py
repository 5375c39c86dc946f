"""Linformer on a GPU: products of the arrays' own library, and softmax attention's kernel."""

import numpy as np

from refattn import checks, gpu
from refattn.linformer import formula
from refattn.softmax.cuda import softmax_attention, softmax_attention_vjp


def linformer_attention(q, k, v, *, E, F=None, key_mask=None, scale=None):
    """``refattn.linformer_attention``."""
    xp, q, k, v, dtype = gpu.qkv(q, k, v)
    with np.errstate(invalid="ignore", over="ignore"):  # as in the formula
        k, v, E, F, _ = _prepared(xp, q, k, v, dtype, E, F, key_mask)
        y = softmax_attention(q, E @ k, F @ v, scale=scale)
    return gpu.cast(xp, y, dtype)


def linformer_attention_vjp(dy, q, k, v, *, E, F=None, key_mask=None, scale=None):
    """``refattn.linformer_attention_vjp``."""
    xp, q, k, v, dtype = gpu.qkv(q, k, v)
    shape = (*checks.lead(q, k, v), q.shape[-2], v.shape[-1])
    dy = gpu.cotangent(xp, q, "dy", dy, shape, dtype)
    shapes = [x.shape for x in (q, k, v)]
    shapes += [gpu.shape_of(E), gpu.shape_of(E if F is None else F)]
    shared = F is None
    with np.errstate(invalid="ignore", over="ignore"):
        k, v, E, F, visible = _prepared(xp, q, k, v, dtype, E, F, key_mask)
        # y = softmax_attention(q, k_r, v_r)
        dq, dk_r, dv_r = softmax_attention_vjp(dy, q, E @ k, F @ v, scale=scale)
        # k_r, v_r = E @ k, F @ v
        dk, dv = _hide_rows(xp, E.mT @ dk_r, visible), _hide_rows(xp, F.mT @ dv_r, visible)
        dE = _hide_columns(xp, dk_r @ k.mT, visible)
        dF = _hide_columns(xp, dv_r @ v.mT, visible)
    found = [dq, dk, dv, dE, dF]
    if shared:  # each summed over its own leading axes, which need not be the same
        dE = gpu.summed(xp, dE, shapes[3]) + gpu.summed(xp, dF, shapes[3])
        found, shapes = [dq, dk, dv, dE], shapes[:4]
    pairs = zip(found, shapes, strict=True)
    return tuple(gpu.cast(xp, gpu.summed(xp, g, shape), dtype) for g, shape in pairs)


def _prepared(xp, q, k, v, dtype, E, F, key_mask):
    """``formula.prepared`` for arrays of any library."""
    if xp is np:
        return formula.prepared(q, k, v, dtype, E, F, key_mask)
    m, lead = k.shape[-2], checks.lead(q, k, v)
    if not _fit(m, lead, E, E if F is None else F):
        formula.prepared(*map(gpu.outline, (q, k, v)), dtype, gpu.outline(E), gpu.outline(F), None)
    E = gpu.real_option(xp, q, "E", E, dtype)
    F = E if F is None else gpu.real_option(xp, q, "F", F, dtype)
    if key_mask is None:
        return k, v, E, F, None
    checks.key_mask(gpu.outline(key_mask), (*lead, m))
    visible = gpu.placed(xp, q, key_mask)
    visible = xp.broadcast_to(visible, np.broadcast_shapes(tuple(visible.shape), (m,)))
    k, v = (_hide_rows(xp, x, visible) for x in (k, v))
    E, F = (_hide_columns(xp, x, visible) for x in (E, F))
    return k, v, E, F, visible


def _fit(m, lead, E, F):
    """Whether projections have shapes that go together; if not, the formula says what is wrong."""
    shapes = [gpu.shape_of(x) for x in (E, F)]
    if any(len(shape) < 2 or shape[-1] != m or shape[-2] < 1 for shape in shapes):
        return False
    try:
        whole = np.broadcast_shapes(lead, *(shape[:-2] for shape in shapes))
    except ValueError:
        return False
    return whole == tuple(lead) and shapes[0][-2] == shapes[1][-2]


def _hide_rows(xp, x, visible):
    """(..., m, c) with zeros at hidden keys: a product with 0 would keep their NaN."""
    return x if visible is None else xp.where(visible[..., None], x, 0)


def _hide_columns(xp, x, visible):
    """(..., r, m) with zeros at hidden keys."""
    return x if visible is None else xp.where(visible[..., None, :], x, 0)
