"""The gradient of ``refattn.softmax.tiles.attend``: each tile of weights is computed again.

With P = exp(S - lse): dV = P^T dY, dS = P (dY V^T - delta), delta = rowsum(dY Y) - dlse,
dQ = scale dS K, dK = scale dS^T Q. Tiles are transposed, keys down and queries across, as in the
forward.
"""

import numpy as np

from refattn.kernels import compiled
from refattn.scalars import exp2
from refattn.softmax.tiles import hide, packed, padded, shape_scores, span_of

WIDE, DEEP, BAND = 64, 64, 8  # queries and keys of a tile, tiles of queries that are packed at once


@compiled
def attend_vjp(first, last, dy, q, k, v, heads, spans, pairs, numbers, plan, out):
    """``out`` = (dq, dk, dv, ds) is written, dq in parts.

    ``pairs`` = (mask, bias, lse, dlse, y): lse and dlse (H, n), lse times log2 e, and +inf for a
    row that saw nothing. ``numbers`` = (scale log2 e, softcap log2 e, scale). ``plan`` (parts, 5)
    has for each part of the keys its first and last + 1, the same of the queries that see any of
    them, and where their rows of dq stand; parts do not depend on the number of threads, and each
    is added up in one order. ``ds`` (H, n, m) gets the gradient of the scores, or has size 0.
    """
    packs = _packs(q, dy)
    for task in range(first, last):
        h = task // len(plan)
        part = plan[task % len(plan)]
        # BAND tiles of queries at a time: what is packed of them stays in the second-level cache
        # while the keys go by.
        for start in range(part[2], part[3], BAND * WIDE):
            stop = min(start + BAND * WIDE, part[3])
            _pack(packs, dy, q, heads[h, 0], spans, pairs, numbers, h, start, stop)
            low, high = _reach(packs, start, stop)
            low = max(part[0], low - (low - part[0]) % DEEP)
            for j0 in range(low, min(part[1], high), DEEP):
                where = start, stop, j0, min(j0 + DEEP, part[1]), part[4] - part[2]
                _keys(packs, k, v, heads[h], pairs, numbers, out, h, where)


@compiled
def _packs(q, dy):
    """Room for a band of queries: both ways around, their spans, lse and delta."""
    d, e = q.shape[2], dy.shape[2]
    return (
        np.empty((BAND, d, WIDE), q.dtype),
        np.empty((BAND, e, WIDE), q.dtype),
        np.empty((BAND, WIDE, d), q.dtype),
        np.empty((BAND, WIDE, e), q.dtype),
        np.empty((2, BAND, WIDE), q.dtype),
        np.empty((2, BAND, WIDE), np.int32),
        np.empty((BAND, 4), np.int64),
    )


@compiled
def _reach(packs, start, stop):
    """The first and last + 1 key that a band sees."""
    bounds = packs[6][: (stop - start + WIDE - 1) // WIDE]
    low, high = bounds[0, 0], bounds[0, 3]
    for i in range(1, len(bounds)):
        low, high = min(low, bounds[i, 0]), max(high, bounds[i, 3])
    return low, high


@compiled
def _pack(packs, dy, q, head, spans, pairs, numbers, h, start, stop):
    qT, dyT, qs, dys, shifts, ends, bounds = packs
    _, _, lse, dlse, y = pairs
    one = q.dtype.type(1)
    for i in range((stop - start + WIDE - 1) // WIDE):
        i0 = start + i * WIDE
        count = min(WIDE, stop - i0)
        packed(q[head, i0 : i0 + count], numbers[0], qT[i])
        packed(dy[h, i0 : i0 + count], one, dyT[i])
        padded(q[head, i0 : i0 + count], numbers[2], qs[i])
        padded(dy[h, i0 : i0 + count], one, dys[i])
        span_of(spans, i0, count, ends[0, i], ends[1, i], bounds[i])
        for a in range(WIDE):  # rows that are not there have no weights
            shifts[0, i, a] = lse[h, i0 + a] if a < count else np.inf
            shifts[1, i, a] = -dlse[h, i0 + a] if a < count else 0
        for a in range(count):
            row, out, delta = dy[h, i0 + a], y[h, i0 + a], q.dtype.type(0)
            for c in range(len(row)):
                delta += row[c] * out[c]
            shifts[1, i, a] += delta


@compiled
def _keys(packs, k, v, at, pairs, numbers, out, h, where):
    """A band of queries against one tile of keys."""
    qT, dyT, qs, dys, shifts, ends, bounds = packs
    dq, dk, dv, ds = out
    start, stop, j0, j1, offset = where
    one = k.dtype.type(1)
    d, e, high = k.shape[2], v.shape[2], j1 - j0
    kt, vt, dkt, dvt = k[at[1], j0:j1], v[at[2], j0:j1], dk[h, j0:j1], dv[h, j0:j1]
    st, dpt = np.empty((high, WIDE), k.dtype), np.empty((high, WIDE), k.dtype)
    slope = np.empty((high if numbers[1] > 0 else 0, WIDE), k.dtype)
    to_v, to_k = np.empty((high, e), k.dtype), np.empty((high, d), k.dtype)
    to_q = np.empty((WIDE, d), k.dtype)
    for i in range((stop - start + WIDE - 1) // WIDE):
        i0 = start + i * WIDE
        count = min(WIDE, stop - i0)
        if j0 >= bounds[i, 3] or j1 <= bounds[i, 0]:
            continue
        np.dot(kt, qT[i], st)
        shape_scores(st, j0, i0, count, at, pairs[0], pairs[1], numbers[1], slope)
        if j0 < bounds[i, 1] or j1 > bounds[i, 2]:
            hide(st, j0, ends[0, i], ends[1, i], bounds[i])
        np.dot(vt, dyT[i], dpt)
        shift, pull = shifts[0, i], shifts[1, i]
        for b in range(high):
            row, drow = st[b], dpt[b]
            for a in range(WIDE):
                p = exp2(row[a] - shift[a])
                row[a] = p
                drow[a] = p * (drow[a] - pull[a])
        # y = P @ v
        np.dot(st, dys[i], to_v)
        add(dvt, to_v, one, high)
        if ds.size > 0:
            for b in range(high):
                for a in range(count):
                    ds[h, i0 + a, j0 + b] = dpt[b, a]
        # s = scale * q @ k.T, capped
        if numbers[1] > 0:
            dpt *= slope
        np.dot(dpt, qs[i], to_k)
        add(dkt, to_k, one, high)
        np.dot(dpt.T, kt, to_q)
        add(dq[h, i0 + offset : i0 + offset + count], to_q, numbers[2], count)


@compiled
def add(total, part, share, rows):
    """total += share * part in its first rows."""
    for a in range(rows):
        into, row = total[a], part[a]
        for c in range(len(row)):
            into[c] += share * row[c]
