"""Blocks on the CPU: every query over the span of its block, summaries apart, and merged."""

import numpy as np

from refattn import checks
from refattn.arrays import gradients, sum_to_shape
from refattn.dispatch import rows_of
from refattn.hierarchy import formula, two_level
from refattn.hierarchy.merged import spans as cuts
from refattn.softmax.cpu import over_spans, over_spans_vjp, some_rows, some_rows_vjp, spans_of
from refattn.softmax.merge import merge_attention


def block_attention(q, k, v, *, block, fuse="concat", weights=None, scale=None):
    """``refattn.block_attention``; "exact" is one softmax by tiles, which are such blocks."""
    q, k, v, dtype = checks.qkv(q, k, v)
    block, weights = formula.checked_options(q, k, v, dtype, block, fuse, weights)
    spans = _spans(q.shape[-2], k.shape[-2], block, fuse)
    a = over_spans(q, k, v, spans, dtype=dtype, scale=scale)[0]
    if fuse in ("concat", "exact"):
        return a.astype(dtype, copy=False)
    return _fused(_in_blocks(a, block), fuse, weights).astype(dtype, copy=False)


def block_attention_vjp(dy, q, k, v, *, block, fuse="concat", weights=None, scale=None):
    """``refattn.block_attention_vjp``."""
    q, k, v, dtype = checks.qkv(q, k, v)
    shape_w = np.shape(weights)
    block, weights = formula.checked_options(q, k, v, dtype, block, fuse, weights)
    n, m, e = q.shape[-2], k.shape[-2], v.shape[-1]
    lead = checks.lead(q, k, v)
    dy = checks.cotangent("dy", dy, (*lead, n if fuse in ("concat", "exact") else block, e), dtype)
    spans = _spans(n, m, block, fuse)
    more = []
    if fuse not in ("concat", "exact"):
        parts = max(1, n // block)
        da = np.broadcast_to(dy[..., None, :, :], (*lead, n // block, block, e))
        if fuse in ("max", "weighted"):
            a = _in_blocks(over_spans(q, k, v, spans, dtype=dtype, scale=scale)[0], block)
        if fuse == "mean":
            da = da / parts
        elif fuse == "max" and n:
            first = np.argmax(a, axis=-3)[..., None, :, :]
            da = np.where(first == np.arange(n // block)[:, None, None], da, 0)
        elif fuse == "weighted":
            # y = sum_i w_i a_i
            more = [sum_to_shape((da * a).sum(axis=(-1, -2)), shape_w)]
            da = weights[..., None, None] * da
        dy = da.reshape(*lead, n, e).astype(q.dtype, copy=False)
    found = over_spans_vjp(dy, q, k, v, spans, dtype=dtype, scale=scale)
    shapes = [q.shape, k.shape, v.shape, *(g.shape for g in more)]
    return gradients([*found, *more], shapes, dtype)


@rows_of(formula.block_attention, backend="numba")
def _some_blocks(rows, n, m, *, block, fuse="concat", weights=None, scale=None):
    """The spans of the rows that are left."""
    form = formula.some_rows(rows, n, m, block=block, fuse=fuse, weights=weights, scale=scale)
    if form is None:
        return None
    spans = _spans(n, m, checks.whole("block", block, least=1), fuse)[rows]
    return some_rows, some_rows_vjp, {"spans": spans, "scale": scale}


def _spans(n, m, block, fuse):
    """Each query's own block; all keys for "exact"."""
    if fuse == "exact":
        return spans_of(n, m)
    block = max(1, min(block, n))
    start = np.arange(n, dtype=np.int32) // block * block
    return np.stack([start, np.minimum(start + block, m)], axis=-1)


def _in_blocks(a, block):
    """(..., n, e) as (..., M, block, e)."""
    return a.reshape(*a.shape[:-2], a.shape[-2] // block, block, a.shape[-1])


def _fused(a, fuse, weights):
    """(..., M, block, e) to (..., block, e), block after block."""
    if not a.shape[-3]:
        return np.zeros((*a.shape[:-3], *a.shape[-2:]), a.dtype)
    if fuse == "max":
        return a.max(axis=-3)
    if fuse == "weighted":
        a = weights[..., None, None] * a
    y = a.sum(axis=-3)
    return y / a.shape[-3] if fuse == "mean" else y


def two_level_attention(q, k, v, *, block, pool="mean", scale=None):
    """``refattn.two_level_attention``: own blocks and summaries, two attentions merged."""
    q, k, v, dtype = checks.qkv(q, k, v)
    near, far = _levels(q, k, v, block, pool, scale)
    parts = [over_spans(q, *keys, **options) for keys, options in (near, far)]
    y, _ = merge_attention(*zip(*parts, strict=True))
    return y.astype(dtype, copy=False)


def two_level_attention_vjp(dy, q, k, v, *, block, pool="mean", scale=None):
    """``refattn.two_level_attention_vjp``."""
    q, k, v, dtype = checks.qkv(q, k, v)
    dy = checks.cotangent("dy", dy, (*checks.lead(q, k, v), q.shape[-2], v.shape[-1]), dtype)
    levels = _levels(q, k, v, block, pool, scale)
    parts = [over_spans(q, *keys, **options) for keys, options in levels]
    y, lse = merge_attention(*zip(*parts, strict=True))
    found = []
    for (a, lse_i), (keys, options) in zip(parts, levels, strict=True):
        # y = sum_i w_i a_i, w_i = exp(lse_i - lse)
        w = np.where(lse_i == -np.inf, 0, np.exp(lse_i - np.where(lse == -np.inf, 0, lse)))
        dlse = w * (dy * (a - y)).sum(axis=-1)
        da = w[..., None] * dy
        found.append(over_spans_vjp(da, q, *keys, dlse=dlse, **options)[:3])
    (dq, dk, dv), (dq_far, dk_pool, dv_pool) = found
    parts = cuts(k.shape[-2], checks.whole("block", block, least=1))
    two_level.unpool(dk, dk_pool, k, parts, pool)
    two_level.unpool(dv, dv_pool, v, parts, pool)
    return gradients((dq + dq_far, dk, dv), (q.shape, k.shape, v.shape), dtype)


def _levels(q, k, v, block, pool, scale):
    """(k, v, spans) and options of each level: the own block, and the summaries of the others."""
    n, m = q.shape[-2], k.shape[-2]
    block = two_level.checked_sizes(n, m, block, pool)
    parts = cuts(m, block)
    k_pool, v_pool = (two_level.pooled(x, parts, pool) for x in (k, v))
    others = np.arange(n)[:, None] // block != np.arange(len(parts))
    sizes = np.array([own.stop - own.start for own in parts], float)
    bias = np.log(sizes).astype(q.dtype)[None]
    shared = {"scale": scale, "dtype": q.dtype}  # the bias is no input: it is not rounded
    near = (k, v, _spans(n, m, block, "concat")), shared
    far = (k_pool, v_pool, spans_of(n, len(parts))), {**shared, "mask": others, "bias": bias}
    return near, far
