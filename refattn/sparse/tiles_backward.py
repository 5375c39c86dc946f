"""The gradient of ``refattn.sparse.tiles.attend``: each tile of weights is computed again.

With P = exp(S - lse): dV = P^T dY, dS = P (dY V^T - delta), delta = rowsum(dY Y), dQ = scale dS K,
dK = scale dS^T Q. Tiles are transposed, keys down and queries across, as in the forward.
"""

import numpy as np
from numba import prange

from refattn.kernels import compiled
from refattn.scalars import exp2
from refattn.softmax.tiles import packed
from refattn.sparse.plan import WIDE
from refattn.sparse.tiles import DEEP, add_rows, dots, hide, rows_of


@compiled
def attend_vjp(dy, q, k, v, heads, plan, parts, numbers, rows, out):
    """``out`` = (dq (H, n, d), dk (H, ., d), dv (H, ., e)), zeros, is added to; dk and dv in parts.

    ``numbers`` = (scale, scale log2 e). ``rows`` = (lse as the forward gave it, delta), (H, n).
    ``parts`` (., 5) has for each part its first and last + 1 tile, the least and largest + 1 key
    that they see, and where these keys stand in dk and dv; parts do not depend on the number of
    threads, and each is added up in one order.
    """
    H, count = len(heads), len(parts)
    for task in prange(H * count):
        h = task // count
        first, last, low, _, place = parts[task % count]
        into = out[0][h], out[1][h, place:], out[2][h, place:]
        given = plan, numbers, rows[0][h], rows[1][h], low
        at = heads[h]
        tiles_vjp(dy[h], q[at[0]], k[at[1]], v[at[2]], given, into, first, last)


@compiled(parallel=False)
def tiles_vjp(dy, q, k, v, given, out, first, last):
    """Tiles ``first`` to ``last`` of one head, one after the other: they add to the same keys."""
    plan = given[0]
    room = np.empty(DEEP, q.dtype), np.empty(DEEP, q.dtype)
    for t in range(first, last):
        if plan.dense[t] > 0:
            dense_vjp(dy, q, k, v, given, out, t)
        for i in range(t * WIDE, min((t + 1) * WIDE, len(q))):
            few = plan.rest[plan.indptr[i] :][: plan.left[i]]
            for p in range(0, len(few), DEEP):
                few_vjp(dy[i], q[i], k, v, given, out, few[p : p + DEEP], i, room)


@compiled(parallel=False)
def few_vjp(dy, q, k, v, given, out, few, i, room):
    """One query over a few keys."""
    plan, numbers, lse, delta, low = given
    dq, dk, dv = out
    s, ds = room
    dots(q, k, few, s)
    dots(dy, v, few, ds)
    for b in range(len(few)):
        s[b] = exp2(s[b] * numbers[1] - lse[i])
        ds[b] = s[b] * (ds[b] - delta[i]) * numbers[0]
    # y = P @ v, s = scale * q @ k.T
    for b in range(len(few)):
        add(dv[few[b] - low], s[b], dy)
        add(dk[few[b] - low], ds[b], q)
    add_rows(dq[i], ds, k, few)


@compiled(parallel=False)
def dense_vjp(dy, q, k, v, given, out, t):
    """The dense columns of one tile."""
    plan, numbers, lse, delta, low = given
    dq, dk, dv = out
    d, e, kind = q.shape[1], v.shape[1], q.dtype.type
    i0, i1 = t * WIDE, min((t + 1) * WIDE, len(q))
    qT, dyT = packed(q[i0:i1], numbers[1], WIDE), packed(dy[i0:i1], kind(1), WIDE)
    qs, dys = padded(q[i0:i1], numbers[0]), padded(dy[i0:i1], kind(1))
    shift, pull = np.full(WIDE, np.inf, q.dtype), np.zeros(WIDE, q.dtype)
    shift[: i1 - i0], pull[: i1 - i0] = lse[i0:i1], delta[i0:i1]
    near_k, near_v = np.empty((DEEP, d), q.dtype), np.empty((DEEP, e), q.dtype)
    to_k, to_v, to_q = np.empty_like(near_k), np.empty_like(near_v), np.empty_like(qs)
    s, dp = np.empty((DEEP, WIDE), q.dtype), np.empty((DEEP, WIDE), q.dtype)
    first, last = plan.start[t], plan.start[t] + plan.dense[t]
    for p in range(first, last, DEEP):
        columns, bits = plan.columns[p : min(p + DEEP, last)], plan.bits[p : min(p + DEEP, last)]
        deep = len(columns)
        st, dst, kt = s[:deep], dp[:deep], rows_of(k, columns, near_k)
        np.dot(kt, qT, st)
        hide(st, bits)
        np.dot(rows_of(v, columns, near_v), dyT, dst)
        for b in range(deep):
            row, drow = st[b], dst[b]
            for a in range(WIDE):
                row[a] = exp2(row[a] - shift[a])
                drow[a] = row[a] * (drow[a] - pull[a])
        # y = P @ v, s = scale * q @ k.T
        np.dot(st, dys, to_v[:deep])
        np.dot(dst, qs, to_k[:deep])
        np.dot(dst.T, kt, to_q)
        for b in range(deep):
            add(dv[columns[b] - low], kind(1), to_v[b])
            add(dk[columns[b] - low], kind(1), to_k[b])
        for i in range(i0, i1):
            add(dq[i], numbers[0], to_q[i - i0])


@compiled(parallel=False)
def padded(x, scale):
    """scale * x, (WIDE, columns), with zeros for rows that x lacks."""
    whole = np.zeros((WIDE, x.shape[1]), x.dtype)
    for a in range(len(x)):
        add(whole[a], scale, x[a])
    return whole


@compiled(parallel=False)
def add(y, weight, x):
    for c in range(len(y)):
        y[c] += weight * x[c]
