"""The gradient of ``refattn.sparse.tiles.attend``: each tile of weights is computed again.

With P = exp(S - lse): dV = P^T dY, dS = P (dY V^T - delta), delta = rowsum(dY Y), dQ = scale dS K,
dK = scale dS^T Q. Tiles are transposed, keys down and queries across, as in the forward.
"""

import numpy as np

from refattn.kernels import compiled
from refattn.scalars import exp2
from refattn.softmax.tiles import packed, padded
from refattn.sparse.plan import WIDE
from refattn.sparse.tiles import DEEP, add_rows, dots, hide, room_for, rows_of


@compiled
def attend_vjp(first, last, dy, q, k, v, heads, plan, parts, numbers, rows, out):
    """``out`` = (dq (H, n, d), dk (H, ., d), dv (H, ., e)), zeros, is added to; dk and dv in parts.

    ``numbers`` = (scale, scale log2 e). ``rows`` = (lse as the forward gave it, delta), (H, n).
    ``parts`` (., 5) has for each part its first and last + 1 tile, the least and largest + 1 key
    that they see, and where these keys stand in dk and dv; parts do not depend on the number of
    threads, and each is added up in one order.
    """
    room, scores = vjp_room(q, k, v), (np.empty(DEEP, q.dtype), np.empty(DEEP, q.dtype))
    for task in range(first, last):
        h, part = task // len(parts), parts[task % len(parts)]
        into = out[0][h], out[1][h, part[4] :], out[2][h, part[4] :]
        given = plan, numbers, rows[0][h], rows[1][h], part[2]
        queries, keys, values = q[heads[h, 0]], k[heads[h, 1]], v[heads[h, 2]]
        for t in range(part[0], part[1]):  # one after the other: they add to the same keys
            if plan.dense[t] > 0:
                dense_vjp(dy[h], queries, keys, values, given, into, t, room)
            for i in range(t * WIDE, min((t + 1) * WIDE, len(queries))):
                few = plan.rest[plan.indptr[i] :][: plan.left[i]]
                for p in range(0, len(few), DEEP):
                    few_vjp(dy[h, i], queries[i], keys, values, given, into, few[p : p + DEEP], i,
                            scores)  # fmt: skip


@compiled
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


@compiled
def vjp_room(q, k, v):
    """Queries both ways around, and lse and delta; rows of keys and values that are brought
    together, scores and their gradient; products before they are added."""
    d, e, kind = k.shape[2], v.shape[2], k.dtype
    turned = np.empty((d, WIDE), kind), np.empty((e, WIDE), kind)
    plain = np.empty((WIDE, d), kind), np.empty((WIDE, e), kind)
    numbers = np.empty(WIDE, kind), np.empty(WIDE, kind)
    scores = np.empty((DEEP, WIDE), kind), np.empty((DEEP, WIDE), kind)
    products = np.empty((DEEP, d), kind), np.empty((DEEP, e), kind), np.empty((WIDE, d), kind)
    return turned, plain, numbers, room_for(k, v), scores, products


@compiled
def dense_vjp(dy, q, k, v, given, out, t, room):
    """The dense columns of one tile."""
    plan, numbers, lse, delta, low = given
    dq, dk, dv = out
    (qT, dyT), (qs, dys), (shift, pull), (near_k, near_v, _), (s, dp), products = room
    to_k, to_v, to_q = products
    i0, i1, one = t * WIDE, min((t + 1) * WIDE, len(q)), q.dtype.type(1)
    packed(q[i0:i1], numbers[1], qT)
    packed(dy[i0:i1], one, dyT)
    padded(q[i0:i1], numbers[0], qs)
    padded(dy[i0:i1], one, dys)
    for a in range(WIDE):  # rows that are not there have no weights
        shift[a] = lse[i0 + a] if i0 + a < i1 else np.inf
        pull[a] = delta[i0 + a] if i0 + a < i1 else 0
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
            add(dv[columns[b] - low], one, to_v[b])
            add(dk[columns[b] - low], one, to_k[b])
        for i in range(i0, i1):
            add(dq[i], numbers[0], to_q[i - i0])


@compiled
def add(y, weight, x):
    for c in range(len(y)):
        y[c] += weight * x[c]
