"""Attention over the pairs of a csr mask, compiled: tiles of queries by the plan of ``plan``.

Tiles of scores stand transposed, keys down and queries across, as in ``refattn.softmax.tiles``.
"""

import numpy as np

from refattn.kernels import compiled
from refattn.scalars import exp2
from refattn.softmax.tiles import absorb, clear, packed, sums_for
from refattn.sparse.plan import WIDE

DEEP = 64  # keys in a tile


@compiled
def attend(first, last, q, k, v, heads, plan, order, scale, out):
    """``out`` = (y (H, n, e), lse (H, n), finite (H, tiles)) is written.

    lse is to base 2, and +inf where nothing is seen; finite says of each tile whether it is so.

    q (., n, d), k (., m, d), v (., m, e): row h of ``heads`` says which of each belongs to head h.
    ``scale`` comes times log2 e, so that exp is 2**. Tasks ``first`` to ``last`` are tiles of one
    head after another, each in the ``order`` given.
    """
    y, lse, finite = out
    room = sums_for(v, WIDE), np.empty((q.shape[2], WIDE), q.dtype), room_for(k, v)
    tiles, s = len(order), np.empty(DEEP, q.dtype)
    for task in range(first, last):
        h, t = task // tiles, order[task % tiles]
        i0, at = t * WIDE, heads[h]
        i1 = min(i0 + WIDE, q.shape[1])
        attend_dense(q[at[0], i0:i1], k[at[1]], v[at[2]], plan, t, scale, room, y[h, i0:i1])
        top, total = room[0][0], room[0][3]
        for i in range(i0, i1):
            few = plan.rest[plan.indptr[i] :][: plan.left[i]]
            x, sums = q[at[0], i], (top[i - i0], total[i - i0])
            if len(few) > 0:
                sums = attend_few(x, k[at[1]], v[at[2]], few, scale, s, sums, y[h, i])
            lse[h, i] = sums[0] + np.log2(sums[1]) if sums[1] != 0 else np.inf
            finite[h, t] &= divide(y[h, i], sums[1])


@compiled
def room_for(k, v):
    """Rows of keys and values that are brought together, and a tile of scores."""
    d, e, kind = k.shape[2], v.shape[2], k.dtype
    return np.empty((DEEP, d), kind), np.empty((DEEP, e), kind), np.empty((DEEP, WIDE), kind)


@compiled
def divide(y, total):
    """y / total in place, or 0; whether all is finite."""
    share, finite = y.dtype.type(1) / total if total != 0 else y.dtype.type(0), True
    for c in range(len(y)):
        y[c] *= share
        finite &= y[c] - y[c] == 0
    return finite


@compiled
def attend_dense(queries, k, v, plan, t, scale, room, y):
    """The dense columns: maxima and sums of weights are left in ``room``; y gets sums of values."""
    state, qT, (near_k, near_v, s) = room
    clear(state)
    first, last = plan.start[t], plan.start[t] + plan.dense[t]
    if last > first:
        packed(queries, scale, qT)
    for p in range(first, last, DEEP):
        columns, bits = plan.columns[p : min(p + DEEP, last)], plan.bits[p : min(p + DEEP, last)]
        st = s[: len(columns)]
        np.dot(rows_of(k, columns, near_k), qT, st)
        hide(st, bits)
        absorb(st, rows_of(v, columns, near_v), state)
    acc = state[4]
    for a in range(len(y)):
        row = y[a]
        for c in range(len(row)):
            row[c] = acc[a, c]


@compiled
def attend_few(x, k, v, few, scale, s, sums, y):
    """One query x over the keys ``few``: y gets their weighted values added.

    Returns the largest score and the sum of weights, which come in as of what y already holds.
    """
    (top, total), kind = sums, x.dtype.type
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
            for c in range(len(y)):
                y[c] *= share
        for b in range(len(part)):
            s[b] = exp2(s[b] - base)
            total += s[b]
        add_rows(y, s, v, part)
    return top, total


@compiled
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


@compiled
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


@compiled
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


@compiled
def hide(st, bits):
    """-inf where a query does not see a key."""
    hidden, one = st.dtype.type(-np.inf), np.uint64(1)
    for b in range(len(bits)):
        row, word = st[b], bits[b]
        if word != np.uint64(2**64 - 1):
            for a in range(WIDE):
                row[a] = row[a] if (word >> np.uint64(a)) & one else hidden
