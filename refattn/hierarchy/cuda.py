"""Blocks on a GPU: every query over the span of its block, summaries apart, and merged."""

import numpy as np

from refattn import checks, gpu
from refattn.dispatch import rows_of
from refattn.hierarchy import formula, two_level
from refattn.softmax.cuda import over_spans, over_spans_vjp, some_rows, some_rows_vjp


def block_attention(q, k, v, *, block, fuse="concat", weights=None, scale=None):
    """``refattn.block_attention``; "exact" is one softmax by tiles, which are such blocks."""
    xp, q, k, v, dtype = gpu.qkv(q, k, v)
    block, weights = _options(xp, q, k, v, dtype, block, fuse, weights)
    spans = _spans(xp, gpu.positions(xp, q, q.shape[-2]), k.shape[-2], block, fuse)
    a, _ = over_spans(q, k, v, spans, dtype=dtype, scale=scale)
    if fuse not in ("concat", "exact"):
        a = _fused(xp, _in_blocks(xp, a, block), fuse, weights)
    return gpu.cast(xp, a, dtype)


def block_attention_vjp(dy, q, k, v, *, block, fuse="concat", weights=None, scale=None):
    """``refattn.block_attention_vjp``."""
    xp, q, k, v, dtype = gpu.qkv(q, k, v)
    shapes = [x.shape for x in (q, k, v)]
    if weights is not None:
        shapes.append(gpu.shape_of(weights))
    block, weights = _options(xp, q, k, v, dtype, block, fuse, weights)
    n, e, lead = q.shape[-2], v.shape[-1], checks.lead(q, k, v)
    apart = fuse in ("concat", "exact")
    dy = gpu.cotangent(xp, q, "dy", dy, (*lead, n if apart else block, e), dtype)
    spans = _spans(xp, gpu.positions(xp, q, n), k.shape[-2], block, fuse)
    more = []
    if not apart:
        a = None
        if fuse in ("max", "weighted"):
            a = _in_blocks(xp, over_spans(q, k, v, spans, dtype=dtype, scale=scale)[0], block)
        dy = xp.broadcast_to(dy[..., None, :, :], (*lead, n // block, block, e))
        if fuse == "weighted":
            # y = sum_i w_i a_i
            more = [xp.sum(dy * a, axis=(-2, -1))]
        dy = xp.reshape(_to_blocks(xp, dy, a, fuse, weights), (*lead, n, e))
    found = [*over_spans_vjp(dy, q, k, v, spans, dtype=dtype, scale=scale), *more]
    pairs = zip(found, shapes, strict=True)
    return tuple(gpu.cast(xp, gpu.summed(xp, g, shape), dtype) for g, shape in pairs)


@rows_of(formula.block_attention, backend="cuda")
def _some_blocks(rows, n, m, *, block, fuse="concat", weights=None, scale=None):
    """The spans of the rows that are left."""
    outline = gpu.outline(weights)
    form = formula.some_rows(rows, n, m, block=block, fuse=fuse, weights=outline, scale=scale)
    if form is None:
        return None
    spans = _spans(np, np.asarray(rows, np.int32), m, block, fuse)
    return some_rows, some_rows_vjp, {"spans": spans, "scale": scale}


def _options(xp, q, k, v, dtype, block, fuse, weights):
    """The checked block, and the weights in the dtype of the arithmetic."""
    outlines = map(gpu.outline, (q, k, v))
    block, _ = formula.checked_options(*outlines, dtype, block, fuse, gpu.outline(weights))
    if weights is not None:
        weights = gpu.real_option(xp, q, "weights", weights, dtype)
    return block, weights


def _spans(xp, i, m, block, fuse):
    """Each query's own block; all keys for "exact". ``i`` are the queries' positions."""
    if fuse == "exact":
        return xp.stack([xp.zeros_like(i), xp.full_like(i, m)], axis=-1)
    block = max(1, min(block, m))
    start = i // block * block
    return xp.stack([start, xp.clip(start + block, 0, m)], axis=-1)


def _in_blocks(xp, a, block):
    """(..., n, e) as (..., M, block, e)."""
    *lead, n, e = a.shape
    return xp.reshape(a, (*lead, n // block, block, e))


def _fused(xp, a, fuse, weights):
    """(..., M, block, e) to (..., block, e)."""
    if not a.shape[-3]:
        shape = (*a.shape[:-3], *a.shape[-2:])
        return gpu.empty(xp, a, shape, gpu.dtype_of(a), fill=0)
    if fuse == "max":
        return xp.max(a, axis=-3)
    if fuse == "weighted":
        a = weights[..., None, None] * a
    y = xp.sum(a, axis=-3)
    return y / a.shape[-3] if fuse == "mean" else y


def _to_blocks(xp, dy, a, fuse, weights):
    """The gradient of ``_fused`` for each block, from dy spread over (..., M, block, e)."""
    blocks = dy.shape[-3]
    if fuse == "mean":
        return dy / max(1, blocks)
    if fuse == "weighted":
        return weights[..., None, None] * dy
    if fuse == "max" and blocks:
        number = xp.arange(blocks, **({} if xp is np else {"device": dy.device}))
        first = xp.argmax(a, axis=-3)[..., None, :, :]
        return xp.where(first == number[:, None, None], dy, 0)
    return dy


def two_level_attention(q, k, v, *, block, pool="mean", scale=None):
    """``refattn.two_level_attention``: own blocks and summaries, two attentions merged."""
    _, *arrays, _ = gpu.qkv(q, k, v)
    two_level.checked_sizes(arrays[0].shape[-2], arrays[1].shape[-2], block, pool)
    return _two_levels(q, k, v, rows=None, block=block, pool=pool, scale=scale)


def two_level_attention_vjp(dy, q, k, v, *, block, pool="mean", scale=None):
    """``refattn.two_level_attention_vjp``."""
    _, *arrays, _ = gpu.qkv(q, k, v)
    two_level.checked_sizes(arrays[0].shape[-2], arrays[1].shape[-2], block, pool)
    return _two_levels_vjp(dy, q, k, v, rows=None, block=block, pool=pool, scale=scale)


@rows_of(two_level.two_level_attention, backend="cuda")
def _some_two_levels(rows, n, m, *, block, pool="mean", scale=None):
    """Queries are independent of each other, but each must know its block."""
    block = two_level.checked_sizes(n, m, block, pool)
    options = {"rows": rows, "block": block, "pool": pool, "scale": scale}
    return _two_levels, _two_levels_vjp, options


def _two_levels(q, k, v, *, rows, block, pool, scale):
    """Two-level attention of queries that stand at ``rows``; None if they are all."""
    xp, q, k, v, dtype = gpu.qkv(q, k, v)
    levels = _levels(xp, q, k, v, _places(xp, q, rows), block, pool, scale)
    return gpu.cast(xp, _merged(xp, _parts(q, levels))[0], dtype)


def _two_levels_vjp(dy, q, k, v, *, rows, block, pool, scale):
    """Gradient of ``_two_levels``."""
    xp, q, k, v, dtype = gpu.qkv(q, k, v)
    shape = (*checks.lead(q, k, v), q.shape[-2], v.shape[-1])
    dy = gpu.cotangent(xp, q, "dy", dy, shape, dtype)
    levels = _levels(xp, q, k, v, _places(xp, q, rows), block, pool, scale)
    parts = _parts(q, levels)
    y, weights = _merged(xp, parts)
    found = []
    for (a, _), w, (keys, options) in zip(parts, weights, levels, strict=True):
        # y = sum_i w_i a_i, w_i = exp(lse_i - lse)
        dlse = w * xp.sum(dy * (a - y), axis=-1)
        found.append(over_spans_vjp(w[..., None] * dy, q, *keys, dlse=dlse, **options)[:3])
    (dq, dk, dv), (dq_far, dk_pool, dv_pool) = found
    dk, dv = (
        g + _unpooled(xp, g_pool, x, block, pool)
        for g, g_pool, x in ((dk, dk_pool, k), (dv, dv_pool, v))
    )
    pairs = (dq + dq_far, q), (dk, k), (dv, v)
    return tuple(gpu.cast(xp, gpu.summed(xp, g, x.shape), dtype) for g, x in pairs)


def _places(xp, q, rows):
    if rows is None:
        return gpu.positions(xp, q, q.shape[-2])
    return gpu.placed(xp, q, np.asarray(rows, np.int32))


def _levels(xp, q, k, v, i, block, pool, scale):
    """(k, v, spans) and options of each level: the own block, and the summaries of the others."""
    m = k.shape[-2]
    block, compute = max(1, min(block, m)), gpu.dtype_of(q)
    k_pool, v_pool = (_pooled(xp, x, block, pool) for x in (k, v))
    count = k_pool.shape[-2]
    others = (i // block)[:, None] != gpu.positions(xp, q, count)
    sizes = np.minimum(block, m - block * np.arange(count))
    bias = gpu.placed(xp, q, np.log(sizes)[None].astype(compute))
    shared = {"scale": scale, "dtype": compute}  # the bias is no input: it is not rounded
    near = (k, v, _spans(xp, i, m, block, "concat")), shared
    far = (k_pool, v_pool, _spans(xp, i, count, 1, "exact"))
    return near, (far, {**shared, "mask": others, "bias": bias})


def _parts(q, levels):
    """y and lse of each level."""
    return [over_spans(q, *keys, **options) for keys, options in levels]


def _merged(xp, parts):
    """y of all keys from (y, lse) of parts of them, and the weight of each part, row by row."""
    ys, lses = zip(*parts, strict=True)
    top = xp.maximum(*lses)
    top = xp.where(top == -np.inf, 0, top)
    weights = [xp.exp(lse - top) for lse in lses]
    total = weights[0] + weights[1]
    total = xp.where(total == 0, 1, total)
    weights = [w / total for w in weights]
    seen = [xp.where((lse == -np.inf)[..., None], 0, y) for y, lse in parts]
    return weights[0][..., None] * seen[0] + weights[1][..., None] * seen[1], weights


def _blocks(xp, x, block):
    """(..., m, c) as (..., M, block, c), and a last block that is short apart; none that is empty.

    They are (..., count, size, c) in a list."""
    *lead, m, c = x.shape
    whole = m // block
    parts = []
    if whole:
        parts.append(xp.reshape(x[..., : whole * block, :], (*lead, whole, block, c)))
    if m % block:
        parts.append(x[..., None, whole * block :, :])
    return parts


def _pooled(xp, x, block, pool):
    """One row a block: (..., M, c)."""
    parts = _blocks(xp, x, block)
    if not parts:
        return x
    means = [(xp.mean if pool == "mean" else xp.max)(part, axis=-2) for part in parts]
    return xp.concat(means, axis=-2)


def _unpooled(xp, d, x, block, pool):
    """From the gradient d (..., M, c) of ``_pooled(x)`` to that of x, with d's leading axes."""
    rows, at = [], 0
    for part in _blocks(xp, x, block):
        count, size, c = part.shape[-3:]
        own = d[..., at : at + count, None, :]
        at += count
        if pool == "mean":
            own = xp.broadcast_to(own / size, (*own.shape[:-2], size, c))
        else:
            number = xp.arange(size, **({} if xp is np else {"device": x.device}))
            first = xp.argmax(part, axis=-2)[..., None, :]
            own = xp.where(first == number[:, None], own, 0)
        rows.append(xp.reshape(own, (*own.shape[:-3], count * size, c)))
    return xp.concat(rows, axis=-2) if rows else d
