"""A csr mask cut for tiles of queries: columns that many of a tile see, and pairs that are left.

A column that at least ``LEAST`` of a tile's queries see is dense: it goes through matrix products,
with a word of bits that says which queries see it. The pairs of all other columns go one by one.
So a query that sees everything costs its own pairs, and not those of its whole tile.
"""

from typing import NamedTuple

import numpy as np

from refattn.kernels import compiled, in_parallel

WIDE = 64  # queries in a tile, one bit each
# As many pairs one by one take as long as a column of a tile: 10 to 16 at d = e = 64, backward and
# forward.
LEAST = 10
BAND = 64  # columns that are looked at together: usual blocks of a mask
FAR = 2**62


class Plan(NamedTuple):
    """Tile t has the dense columns ``columns[start[t]:][:dense[t]]``, seen as ``bits`` say; query i
    is left with the pairs ``rest[indptr[i]:][:left[i]]``. Both in rising order."""

    start: np.ndarray
    dense: np.ndarray
    columns: np.ndarray
    bits: np.ndarray
    indptr: np.ndarray
    left: np.ndarray
    rest: np.ndarray


def plan_of(mask):
    """The plan of a canonical csr mask (n, m)."""
    n, m = mask.shape
    indices = np.require(mask.indices, np.int32, ["C", "A", "W"])
    indptr = mask.indptr.astype(np.int64)
    tiles = -(-n // WIDE)
    pairs = np.diff(indptr[np.minimum(np.arange(tiles + 1) * WIDE, n)])
    start = np.concatenate(([0], np.cumsum(np.minimum(pairs // LEAST, m))))
    dense, left = np.zeros(tiles, np.int64), np.zeros(n, np.int64)
    columns, bits = np.empty(start[-1], np.int32), np.empty(start[-1], np.uint64)
    plan = Plan(start, dense, columns, bits, indptr, left, np.empty_like(indices))
    in_parallel(cut, tiles, indices, plan)
    return plan


@compiled
def cut(first, last, indices, plan):
    """Tiles ``first`` to ``last``."""
    for t in range(first, last):
        cut_tile(indices, plan, t)


@compiled
def cut_tile(indices, plan, t):
    """Walk along the rows of a tile together, a band of columns at a time."""
    i0, place = t * WIDE, plan.start[t]
    ends = plan.indptr[i0 + 1 : i0 + WIDE + 1]  # of each row's pairs
    here = plan.indptr[i0 : i0 + len(ends)].copy()  # each row's first pair ahead
    after, met, took = np.empty_like(here), np.empty_like(here), np.empty_like(here)
    for a in range(len(ends)):
        after[a] = indices[here[a]] if here[a] < ends[a] else FAR  # its column
    band = turns, steps = np.zeros(BAND + 1, np.uint64), np.zeros(BAND + 1, np.int64)
    number = np.zeros(BAND, np.int64)  # of rows that see each column
    j0 = after.min()
    while j0 < FAR:
        rows, nearest = meet(after, j0, met)
        number[:] = 0
        rare = rows < LEAST  # then no column here is dense
        if not rare:
            for r in range(rows):
                a = met[r]
                took[a] = mark(indices, here[a], ends[a], j0, np.uint64(1) << np.uint64(a), band)
            word, many = np.uint64(0), 0
            for b in range(BAND):
                word ^= turns[b]
                many += steps[b]
                turns[b], steps[b], number[b] = 0, 0, many
                rare |= 0 < many < LEAST
                if many >= LEAST:
                    plan.columns[place], plan.bits[place] = j0 + b, word
                    place += 1
        for r in range(rows):
            a = met[r]
            if rare:
                took[a] = keep(indices, here[a], ends[a], j0, number, plan, i0 + a)
            here[a] = took[a]
            after[a] = indices[here[a]] if here[a] < ends[a] else FAR
            nearest = min(nearest, after[a])
        j0 = nearest
    plan.dense[t] = place - plan.start[t]


@compiled
def meet(after, j0, met):
    """The rows with pairs in the band at j0, and the nearest column of the others."""
    rows, nearest = 0, FAR
    for a in range(len(after)):
        if after[a] < j0 + BAND:
            met[rows] = a
            rows += 1
        else:
            nearest = min(nearest, after[a])
    return rows, nearest


@compiled
def mark(indices, p, end, j0, bit, band):
    """A row's pairs in the band from p on: where a run of columns begins and ends, the row's bit
    turns and the number of rows steps, so that a run takes no longer than one column.

    Returns the first pair past the band.
    """
    turns, steps = band
    while p < end and indices[p] < j0 + BAND:
        b = indices[p] - j0
        run = min(end - p, BAND - b)
        if indices[p + run - 1] != indices[p] + run - 1:  # rows are sorted, so there is a gap
            run = 1
        turns[b] ^= bit
        turns[b + run] ^= bit
        steps[b] += 1
        steps[b + run] -= 1
        p += run
    return p


@compiled
def keep(indices, p, end, j0, number, plan, i):
    """Query i is left with its pairs in the band's columns that are not dense."""
    while p < end and indices[p] < j0 + BAND:
        if number[indices[p] - j0] < LEAST:
            plan.rest[plan.indptr[i] + plan.left[i]] = indices[p]
            plan.left[i] += 1
        p += 1
    return p
