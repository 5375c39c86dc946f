"""Softmax attention by tiles, compiled: the one kernel behind every attention that weighs pairs.

Tiles of scores are held transposed, keys down and queries across: S^T = K Q^T. The maximum and the
sum over keys are then updates of whole rows of the tile, one vector instruction for several
queries; along a row of queries' scores they would be sums within a vector, four times as slow.
"""

import numpy as np

from refattn.kernels import compiled
from refattn.scalars import LN2, LOG2E, exp2, tanh


@compiled
def attend(first, last, q, k, v, heads, spans, mask, bias, numbers, tile, out):
    """Online softmax attention: ``out`` = (y (H, n, e), lse (H, n), finite) is written.

    Tasks ``first`` to ``last`` are tiles of queries, of one head after another; finite says of each
    whether it came out so.

    q (., n, d), k (., m, d), v (., m, e), mask and bias (., n or 1, m or 1), or of size 0: row h of
    ``heads`` says which of each belongs to head h. Query i sees the keys of
    ``spans[i]`` = (first, last + 1) that the mask leaves. ``numbers`` = (scale, softcap), both
    times log2 e, so that exp is 2**; a softcap of 0 is none.
    """
    y, lse, finite = out
    wide, deep = tile
    n, tiles = q.shape[1], len(finite) // len(y)
    qT, state = np.empty((q.shape[2], wide), q.dtype), sums_for(v, wide)
    s, none = np.empty((deep, wide), q.dtype), np.empty((0, 0), q.dtype)
    lo, hi, bounds = np.empty(wide, np.int32), np.empty(wide, np.int32), np.empty(4, np.int64)
    for t in range(first, last):
        h, i = t // tiles, t % tiles
        # Causal tiles grow with i: low and high ones take turns, so that pieces are alike.
        i0 = wide * (i // 2 if i % 2 == 0 else tiles - 1 - i // 2)
        at, i1 = heads[h], min(i0 + wide, n)
        packed(q[at[0], i0:i1], numbers[0], qT)
        span_of(spans, i0, i1 - i0, lo, hi, bounds)
        clear(state)
        for j0 in range(bounds[0], bounds[3], deep):
            j1 = min(j0 + deep, bounds[3])
            st = s[: j1 - j0]
            np.dot(k[at[1], j0:j1], qT, st)
            shape_scores(st, j0, i0, i1 - i0, at, mask, bias, numbers[1], none)
            if j0 < bounds[1] or j1 > bounds[2]:  # some query does not see all of this tile
                hide(st, j0, lo, hi, bounds)
            absorb(st, v[at[2], j0:j1], state)
        finite[t] = write(state, y[h, i0:i1], lse[h, i0:i1])


@compiled
def sums_for(v, wide):
    """Room for what ``absorb`` keeps of a tile of queries: the running maximum of each query's
    scores; the same, and 0 where nothing has been seen; the one before; the sums of weights and of
    weighted values; and a product before it is added."""
    rows = np.empty((4, wide), v.dtype)
    acc = np.empty((2, wide, v.shape[2]), v.dtype)
    return rows[0], rows[1], rows[2], rows[3], acc[0], acc[1]


@compiled
def clear(state):
    """Nothing seen yet."""
    top, base, _, total, acc, _ = state
    for a in range(len(top)):
        top[a], base[a], total[a] = -np.inf, 0, 0
    for a in range(len(acc)):
        row = acc[a]
        for c in range(len(row)):
            row[c] = 0


@compiled
def absorb(st, v, state):
    """Online softmax: a tile of scores and its values join the sums so far."""
    top, base, before, total, acc, part = state
    kind, wide, last = st.dtype.type, st.shape[1], len(st) - 1
    for b in range(0, last + 1, 4):  # four rows for each time that top is loaded and stored
        r0, r1 = st[b], st[min(b + 1, last)]
        r2, r3 = st[min(b + 2, last)], st[min(b + 3, last)]
        for a in range(wide):
            top[a] = max(top[a], max(max(r0[a], r1[a]), max(r2[a], r3[a])))
    moved = False
    for a in range(wide):
        before[a] = base[a]
        base[a] = top[a] if top[a] > kind(-np.inf) else kind(0)
        moved |= base[a] != before[a]
    if moved:  # rare once the largest score has been met
        for a in range(wide):
            before[a] = exp2(before[a] - base[a]) if total[a] != 0 else kind(0)
            total[a] *= before[a]
        for a in range(wide):
            row, share = acc[a], before[a]
            for c in range(len(row)):
                row[c] *= share
    for b in range(last + 1):
        row = st[b]
        for a in range(wide):
            row[a] = exp2(row[a] - base[a])
            total[a] += row[a]
    np.dot(st.T, v, part)
    for a in range(wide):
        row, more = acc[a], part[a]
        for c in range(len(row)):
            row[c] += more[c]


@compiled
def packed(x, scale, xT):
    """xT (columns, wide) = scale * x^T, with zeros for rows that x lacks."""
    last = x.shape[0] - 1
    for a in range(0, last + 1, 4):  # four rows at a time; past the last, it is taken again
        r0, r1 = x[a], x[min(a + 1, last)]
        r2, r3 = x[min(a + 2, last)], x[min(a + 3, last)]
        for c in range(x.shape[1]):
            out = xT[c, a : a + 4]
            out[0], out[1] = r0[c] * scale, r1[c] * scale
            out[2], out[3] = r2[c] * scale, r3[c] * scale
    for a in range(last + 1, xT.shape[1]):
        for c in range(x.shape[1]):
            xT[c, a] = 0


@compiled
def padded(x, scale, out):
    """out (wide, columns) = scale * x, with zeros for rows that x lacks."""
    for a in range(out.shape[0]):
        row = out[a]
        for c in range(x.shape[1]):
            row[c] = x[a, c] * scale if a < x.shape[0] else 0


@compiled
def span_of(spans, i0, count, lo, hi, bounds):
    """First and last + 1 key of each query of a tile, and (least first, largest first, least last,
    largest last) of them; none for queries that are not there."""
    bounds[0], bounds[1], bounds[2], bounds[3] = 2**62, 0, 2**62, 0
    for a in range(count, len(lo)):
        lo[a], hi[a] = 0, 0
    for a in range(count):
        lo[a], hi[a] = spans[i0 + a, 0], spans[i0 + a, 1]
        bounds[0], bounds[1] = min(bounds[0], lo[a]), max(bounds[1], lo[a])
        bounds[2], bounds[3] = min(bounds[2], hi[a]), max(bounds[3], hi[a])


@compiled
def hide(st, j0, lo, hi, bounds):
    """-inf for the keys that are out of a query's span."""
    hidden = st.dtype.type(-np.inf)
    for b in range(st.shape[0]):
        if bounds[1] <= j0 + b < bounds[2]:  # seen by every query
            continue
        row, j = st[b], np.int32(j0 + b)
        for a in range(st.shape[1]):
            row[a] = row[a] if (lo[a] <= j) & (j < hi[a]) else hidden


@compiled
def shape_scores(st, j0, i0, count, at, mask, bias, softcap, slope):
    """Softcap, bias and mask, in this order, on a tile of scores; the softcap's slope is kept where
    there is room for it."""
    kind = st.dtype.type
    if softcap > 0:
        keep = slope.shape[0] >= st.shape[0] and slope.shape[1] == st.shape[1]
        for b in range(st.shape[0]):
            row = st[b]
            for a in range(st.shape[1]):
                t = tanh(row[a] / softcap)
                row[a] = softcap * t
                if keep:
                    slope[b, a] = kind(1) - t * t
    if bias.size > 0:
        down, across = min(1, bias.shape[1] - 1), min(1, bias.shape[2] - 1)
        hidden, least = kind(-np.inf), kind(np.finfo(st.dtype).min)
        for a in range(count):
            row = bias[at[4], (i0 + a) * down]
            for b in range(st.shape[0]):
                more = row[(j0 + b) * across]
                if more > hidden:  # the lowest number there is stays one
                    st[b, a] += max(more * kind(LOG2E), least)
                else:
                    st[b, a] = more + st[b, a]
    if mask.size > 0:
        down, across = min(1, mask.shape[1] - 1), min(1, mask.shape[2] - 1)
        for a in range(count):
            row = mask[at[3], (i0 + a) * down]
            for b in range(st.shape[0]):
                if not row[(j0 + b) * across]:
                    st[b, a] = kind(-np.inf)


@compiled
def write(state, y, lse):
    """acc / total, and base + log2 total in natural units; a row that saw nothing is 0 and -inf.

    Returns whether all is finite."""
    _, base, _, total, acc, _ = state
    finite, kind = 0, y.dtype.type
    for a in range(y.shape[0]):
        row, out = acc[a], y[a]
        share = kind(1) / total[a] if total[a] != 0 else kind(0)
        lse[a] = (base[a] + np.log2(total[a])) * LN2 if total[a] != 0 else kind(-np.inf)
        for c in range(y.shape[1]):
            out[c] = row[c] * share
        for c in range(y.shape[1]):
            finite += out[c] - out[c] == 0  # NaN for a NaN or an infinite number
    return finite == y.size
