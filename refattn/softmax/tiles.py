"""Softmax attention by tiles, compiled: the one kernel behind every attention that weighs pairs.

Tiles of scores are held transposed, keys down and queries across: S^T = K Q^T. The maximum and the
sum over keys are then updates of whole rows of the tile, one vector instruction for several
queries; along a row of queries' scores they would be sums within a vector, four times as slow.
"""

import numpy as np
from numba import prange

from refattn.kernels import compiled
from refattn.scalars import LN2, LOG2E, exp2, tanh


@compiled
def attend(q, k, v, heads, spans, mask, bias, numbers, tile, out):
    """Online softmax attention: ``out`` = (y (H, n, e), lse (H, n)) is written.

    q (., n, d), k (., m, d), v (., m, e), mask and bias (., n or 1, m or 1), or of size 0: row h of
    ``heads`` says which of each belongs to head h. Query i sees the keys of
    ``spans[i]`` = (first, last + 1) that the mask leaves. ``numbers`` = (scale, softcap), both
    times log2 e, so that exp is 2**; a softcap of 0 is none.

    Returns whether each tile of queries came out finite.
    """
    y, lse = out
    H, n, e = y.shape
    tiles = (n + tile[0] - 1) // tile[0]
    finite = np.ones(H * tiles, np.bool_)
    for t in prange(H * tiles):
        h, i = t // tiles, t % tiles
        # Causal tiles grow with i: low and high ones take turns, so that threads share alike.
        i = i // 2 if i % 2 == 0 else tiles - 1 - i // 2
        finite[t] = attend_tile(q, k, v, heads[h], spans, mask, bias, numbers, tile, y, lse, h, i)
    return finite


@compiled(parallel=False)
def attend_tile(q, k, v, at, spans, mask, bias, numbers, tile, y, lse, h, i):
    """One tile of queries over all keys that they see."""
    wide, deep = tile
    e, n = v.shape[2], q.shape[1]
    i0 = i * wide
    count = min(wide, n - i0)
    qT = packed(q[at[0], i0 : i0 + count], numbers[0], wide)  # (d, wide)
    lo, hi, bounds = span_of(spans, i0, count, wide)
    top = np.full(wide, q.dtype.type(-np.inf), q.dtype)  # running maximum of each query's scores
    base = np.zeros(wide, q.dtype)  # the same, and 0 where nothing has been seen
    before = np.zeros(wide, q.dtype)
    total = np.zeros(wide, q.dtype)
    acc = np.zeros((e, wide), q.dtype)
    part = np.empty((e, wide), q.dtype)
    state = top, base, before, total, acc, part
    s, none = np.empty((deep, wide), q.dtype), np.empty((0, 0), q.dtype)
    for j0 in range(bounds[0], bounds[3], deep):
        j1 = min(j0 + deep, bounds[3])
        st = s[: j1 - j0]
        np.dot(k[at[1], j0:j1], qT, st)
        shape_scores(st, j0, i0, count, at, mask, bias, numbers[1], none)
        if j0 < bounds[1] or j1 > bounds[2]:  # some query does not see all of this tile
            hide(st, j0, lo, hi)
        absorb(st, v[at[2], j0:j1], state)
    return write(acc, total, base, y[h, i0 : i0 + count], lse[h, i0 : i0 + count])


@compiled(parallel=False)
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
        for c in range(len(acc)):
            row = acc[c]
            for a in range(wide):
                row[a] *= before[a]
    for b in range(last + 1):
        row = st[b]
        for a in range(wide):
            row[a] = exp2(row[a] - base[a])
            total[a] += row[a]
    np.dot(v.T, st, part)
    for c in range(len(acc)):
        row, more = acc[c], part[c]
        for a in range(wide):
            row[a] += more[a]


@compiled(parallel=False)
def packed(x, scale, wide):
    """scale * x^T, (columns, wide), with zeros for rows that x lacks."""
    xT = np.zeros((x.shape[1], wide), x.dtype)
    for a in range(x.shape[0]):
        for c in range(x.shape[1]):
            xT[c, a] = x[a, c] * scale
    return xT


@compiled(parallel=False)
def span_of(spans, i0, count, wide):
    """First and last + 1 key of each query of a tile, and (least first, largest first, least last,
    largest last) of them."""
    lo, hi = np.zeros(wide, np.int64), np.zeros(wide, np.int64)
    bounds = np.array([2**62, 0, 2**62, 0])
    for a in range(count):
        lo[a], hi[a] = spans[i0 + a, 0], spans[i0 + a, 1]
        bounds[0], bounds[1] = min(bounds[0], lo[a]), max(bounds[1], lo[a])
        bounds[2], bounds[3] = min(bounds[2], hi[a]), max(bounds[3], hi[a])
    return lo, hi, bounds


@compiled(parallel=False)
def hide(st, j0, lo, hi):
    """-inf for the keys that are out of a query's span."""
    hidden = st.dtype.type(-np.inf)
    for b in range(st.shape[0]):
        row, j = st[b], j0 + b
        for a in range(st.shape[1]):
            row[a] = row[a] if lo[a] <= j < hi[a] else hidden


@compiled(parallel=False)
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
        for a in range(count):
            row = bias[at[4], (i0 + a) * down]
            for b in range(st.shape[0]):
                st[b, a] += row[(j0 + b) * across] * kind(LOG2E)
    if mask.size > 0:
        down, across = min(1, mask.shape[1] - 1), min(1, mask.shape[2] - 1)
        for a in range(count):
            row = mask[at[3], (i0 + a) * down]
            for b in range(st.shape[0]):
                if not row[(j0 + b) * across]:
                    st[b, a] = kind(-np.inf)


@compiled(parallel=False)
def write(acc, total, base, y, lse):
    """acc / total, and base + log2 total in natural units; a row that saw nothing is 0 and -inf."""
    finite = True
    kind = y.dtype.type
    for a in range(y.shape[0]):
        share = kind(1) / total[a] if total[a] != 0 else kind(0)
        lse[a] = (base[a] + np.log2(total[a])) * LN2 if total[a] != 0 else kind(-np.inf)
        for c in range(y.shape[1]):
            y[a, c] = acc[c, a] * share
            finite &= y[a, c] - y[a, c] == 0
    return finite
