"""Local attention on a GPU: each query over the span of its window, by softmax attention's kernel.

A dilated window meets only keys of one residue modulo the dilation, and among these it is
undilated: residues become one more leading axis, and all are computed in one launch.
"""

import numpy as np

from refattn import gpu, masks
from refattn.checks import lead
from refattn.dispatch import rows_of
from refattn.softmax.cuda import handed_out, over_spans, over_spans_vjp, some_rows, some_rows_vjp
from refattn.sparse import formula


def local_attention(q, k, v, *, window, causal=False, dilation=1, scale=None):
    """``refattn.local_attention``, each query over the span of its window."""
    xp, q, k, v, dtype = gpu.qkv(q, k, v)
    n, m = q.shape[-2], k.shape[-2]
    spans, front, step = _windows(xp, q, m, window, causal, dilation)
    q, k, v = _by_residue(xp, q, front, step), *(_by_residue(xp, x, 0, step) for x in (k, v))
    y, _ = over_spans(q, k, v, spans, dtype=dtype, scale=scale)
    return gpu.cast(xp, _in_line(xp, y, front, step, n), dtype)


def local_attention_vjp(dy, q, k, v, *, window, causal=False, dilation=1, scale=None):
    """``refattn.local_attention_vjp``, each query over the span of its window."""
    xp, q, k, v, dtype = gpu.qkv(q, k, v)
    n, m = q.shape[-2], k.shape[-2]
    dy = gpu.cotangent(xp, q, "dy", dy, (*lead(q, k, v), n, v.shape[-1]), dtype)
    spans, front, step = _windows(xp, q, m, window, causal, dilation)
    rows = (_by_residue(xp, x, front, step) for x in (dy, q))
    keys = (_by_residue(xp, x, 0, step) for x in (k, v))
    found = over_spans_vjp(*rows, *keys, spans, dtype=dtype, scale=scale)
    places = (front, n), (0, m), (0, m)
    found = [_in_line(xp, g, at, step, size) for g, (at, size) in zip(found, places, strict=True)]
    return handed_out(found, q, k, v, None, dtype)


@rows_of(formula.local_attention, backend="cuda")
def _some_windows(rows, n, m, *, window, causal=False, dilation=1, **options):
    """The spans of the rows that are left; a dilated window as a mask."""
    if masks.reach(n, m, window, causal, dilation)[2] > 1:
        mask = masks.local(n, window, m=m, causal=causal, dilation=dilation)[rows]
        return formula.sparse_attention, formula.sparse_attention_vjp, {**options, "mask": mask}
    first, count = (x[rows] for x in masks.window_keys(n, m, window, causal))
    first = np.minimum(first, m)  # of an empty window it may be anywhere
    spans = np.stack([first, first + count], axis=-1).astype(np.int32)
    return some_rows, some_rows_vjp, {**options, "spans": spans}


def _windows(xp, q, m, window, causal, dilation):
    """Spans (dilation, rows, 2) of the queries by residue; where they begin, and the dilation.

    Query i stands at position p = i + (m - n), which is number p // dilation of its residue
    p % dilation; row 0 of all residues has one number, so some rows hold no query: an empty span.
    """
    n = q.shape[-2]
    left, right, step = masks.reach(n, m, window, causal, dilation)
    left, right = (min(side, n + m) for side in (left, right))
    front, base = (m - n) % step, (m - n) // step
    residue = gpu.positions(xp, q, step)[:, None]
    row = gpu.positions(xp, q, -(-(n + front) // step))[None]
    i = row * step + residue - front  # (dilation, rows)
    count = (m - 1 - residue) // step + 1  # keys of each residue
    first = xp.minimum(xp.clip(row + (base - left), 0, m), count)
    last = xp.minimum(xp.clip(row + (base + right + 1), 0, m), count)
    last = xp.where((i >= 0) & (i < n), last, first)
    spans = xp.stack([first, last], axis=-1)
    return (spans[0] if step == 1 else spans), front, step


def _by_residue(xp, x, front, step):
    """(..., n, c) as (..., step, rows, c): x begins at place ``front``, zeros are around it."""
    if step == 1:
        return x
    *lead, n, c = x.shape
    rows = -(-(n + front) // step)
    around = [
        gpu.empty(xp, x, (*lead, size, c), gpu.dtype_of(x), fill=0)
        for size in (front, rows * step - n - front)
    ]
    x = xp.concat([around[0], x, around[1]], axis=-2)
    return xp.moveaxis(xp.reshape(x, (*lead, rows, step, c)), -2, -3)


def _in_line(xp, x, front, step, n):
    """The way back: (..., step, rows, c) as (..., n, c)."""
    if step == 1:
        return x
    *lead, step, rows, c = x.shape
    x = xp.reshape(xp.moveaxis(x, -3, -2), (*lead, rows * step, c))
    return x[..., front : front + n, :]
