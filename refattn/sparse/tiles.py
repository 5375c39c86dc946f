"""Attention over the pairs of a csr mask, compiled: tiles of queries by the plan of ``plan``.

Tiles of scores stand transposed, keys down and queries across, as in ``refattn.softmax.tiles``.
"""

import numpy as np
from numba import prange

from refattn.kernels import compiled
from refattn.scalars import exp2
from refattn.softmax.tiles import absorb, packed
from refattn.sparse.plan import WIDE

DEEP = 64  # keys in a tile


@compiled
def attend(q, k, v, heads, plan, order, scale, out):
    """``out`` = (y (H, n, e), lse (H, n)) is written, lse to base 2 and +inf where nothing is seen.

    q (., n, d), k (., m, d), v (., m, e): row h of ``heads`` says which of each belongs to head h.
    ``scale`` comes times log2 e, so that exp is 2**. Tiles are taken in their ``order``.

    Returns whether each tile came out finite, (H, tiles).
    """
    tiles = len(order)
    finite = np.ones((len(heads), tiles), np.bool_)
    for task in prange(len(heads) * tiles):
        h, t = task // tiles, order[task % tiles]
        finite[h, t] = attend_tile(q, k, v, heads[h], plan, scale, out[0][h], out[1][h], t)
    return finite


@compiled(parallel=False)
def attend_tile(q, k, v, at, plan, scale, y, lse, t):
    """One tile of queries: first its dense columns, then the pairs that are left."""
    i0, kind = t * WIDE, q.dtype.type
    queries, k, v = q[at[0], i0 : min(i0 + WIDE, q.shape[1])], k[at[1]], v[at[2]]
    count = len(queries)
    y, lse = y[i0 : i0 + count], lse[i0 : i0 + count]
    top, total = np.full(WIDE, kind(-np.inf), q.dtype), np.zeros(WIDE, q.dtype)
    y[:] = kind(0)
    if plan.dense[t] > 0:
        attend_dense(queries, k, v, plan, t, scale, top, total, y)
    s = np.empty(DEEP, q.dtype)
    finite = True
    for a in range(count):
        few = plan.rest[plan.indptr[i0 + a] :][: plan.left[i0 + a]]
        if len(few) > 0:
            top[a], total[a] = attend_few(queries[a], k, v, few, scale, s, top[a], total[a], y[a])
        share = kind(1) / total[a] if total[a] != 0 else kind(0)
        lse[a] = top[a] + np.log2(total[a]) if total[a] != 0 else kind(np.inf)
        row = y[a]
        for c in range(len(row)):
            row[c] *= share
            finite &= row[c] - row[c] == 0
    return finite


@compiled(parallel=False)
def attend_dense(queries, k, v, plan, t, scale, top, total, y):
    """The dense columns: ``top``, ``total`` and y get maxima, sums of weights and of values."""
    d, e = k.shape[1], v.shape[1]
    qT = packed(queries, scale, WIDE)  # (d, WIDE)
    acc, s = np.zeros((e, WIDE), y.dtype), np.empty((DEEP, WIDE), y.dtype)
    base = np.zeros(WIDE, y.dtype)
    state = top, base, np.empty_like(base), total, acc, np.empty_like(acc)
    near_k, near_v = np.empty((DEEP, d), y.dtype), np.empty((DEEP, e), y.dtype)
    first, last = plan.start[t], plan.start[t] + plan.dense[t]
    for p in range(first, last, DEEP):
        columns, bits = plan.columns[p : min(p + DEEP, last)], plan.bits[p : min(p + DEEP, last)]
        st = s[: len(columns)]
        np.dot(rows_of(k, columns, near_k), qT, st)
        hide(st, bits)
        absorb(st, rows_of(v, columns, near_v), state)
    for a in range(len(y)):
        row = y[a]
        for c in range(e):
            row[c] = acc[c, a]


@compiled(parallel=False)
def attend_few(x, k, v, few, scale, s, top, total, y):
    """One query x over the keys ``few``: y gets their weighted values added.

    Returns the largest score and the sum of weights, which come in as of what y already holds.
    """
    kind = x.dtype.type
    for p in range(0, len(few), len(s)):
        part = few[p : p + len(s)]
        dots(x, k, part, s)
        before = top
        for b in range(len(part)):
            s[b] *= scale
            top = max(top, s[b])
        base = top if top > kind(-np.inf) else kind(0)
        if total != 0 and top > before:
            share = exp2(before - top)
            total *= share
            y *= share
        for b in range(len(part)):
            s[b] = exp2(s[b] - base)
            total += s[b]
        add_rows(y, s, v, part)
    return top, total


@compiled(parallel=False)
def dots(x, rows, few, s):
    """s = the products of x with the rows ``few``.

    Four at a time: each number of x is loaded once for four, and the misses of four rows overlap.
    Past the last, it is taken again.
    """
    last = len(few) - 1
    for b in range(0, last + 1, 4):
        r0, r1 = rows[few[b]], rows[few[min(b + 1, last)]]
        r2, r3 = rows[few[min(b + 2, last)]], rows[few[min(b + 3, last)]]
        t0 = t1 = t2 = t3 = x.dtype.type(0)
        for c in range(len(x)):
            t0 += x[c] * r0[c]
            t1 += x[c] * r1[c]
            t2 += x[c] * r2[c]
            t3 += x[c] * r3[c]
        s[b], s[b + 1], s[b + 2], s[b + 3] = t0, t1, t2, t3


@compiled(parallel=False)
def add_rows(y, s, rows, few):
    """y += the sum of the rows ``few`` times s, four at a time as in ``dots``."""
    last = len(few) - 1
    for b in range(last + 1, (last + 4) // 4 * 4):
        s[b] = 0
    for b in range(0, last + 1, 4):
        r0, r1 = rows[few[b]], rows[few[min(b + 1, last)]]
        r2, r3 = rows[few[min(b + 2, last)]], rows[few[min(b + 3, last)]]
        s0, s1, s2, s3 = s[b], s[b + 1], s[b + 2], s[b + 3]
        for c in range(len(y)):
            y[c] += s0 * r0[c] + s1 * r1[c] + s2 * r2[c] + s3 * r3[c]


@compiled(parallel=False)
def rows_of(x, columns, room):
    """Rows of x: where they stand one after the other in place, else gathered into ``room``."""
    first, count = columns[0], len(columns)
    if columns[count - 1] - first == count - 1:
        return x[first : first + count]
    for b in range(count):
        row, into = x[columns[b]], room[b]
        for c in range(len(row)):
            into[c] = row[c]
    return room[:count]


@compiled(parallel=False)
def hide(st, bits):
    """-inf where a query does not see a key."""
    hidden, one = st.dtype.type(-np.inf), np.uint64(1)
    for b in range(len(bits)):
        row, word = st[b], bits[b]
        if word != np.uint64(2**64 - 1):
            for a in range(WIDE):
                row[a] = row[a] if (word >> np.uint64(a)) & one else hidden
