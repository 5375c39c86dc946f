"""Softmax attention by tiles on a GPU: the one kernel behind every attention over spans of keys.

A block of threads owns a tile of queries of one head and goes over the keys tile by tile. A tile of
scores S = Q K^T, made from shared memory, is spread over the registers of all threads; its weights
go back to shared memory and P V is added to sums that stay in registers too. Thread (y, x) holds
the scores of queries y, y + down, ... with keys x, x + across, ...: neighbours read neighbouring
rows, four columns at a time, without a conflict of banks.
"""

import functools
import math
from typing import NamedTuple

import numba
import numpy as np

from refattn import gpu
from refattn.gpu import cuda
from refattn.scalars import LOG2E

PAD = 4  # numbers at the end of a row in shared memory: neighbouring rows start in other banks
# Shared arrays at addresses that four numbers can be loaded from at once. The simulator refuses to
# be asked.
ALIGNED = not gpu.SIMULATED


class Tile(NamedTuple):
    """Queries and keys of a tile, threads along each, and columns of q and k, and of v, that are
    in shared memory at a time.

    All are powers of two, rows and keys at least 4, d at least 8. Columns that a product is spread
    over, e and in the backward pass d, are at least 4 * across. No more columns than threads.
    """

    rows: int
    keys: int
    down: int
    across: int
    d: int
    e: int

    @property
    def threads(self):
        return self.down * self.across


class Given(NamedTuple):
    """What a call came with: the kernel is compiled for it alone."""

    mask: bool = False
    bias: bool = False
    softcap: bool = False


def tile_of(d, e, kind, small=gpu.SIMULATED):
    """The forward tile for d and e columns: 64 queries, micro-tiles of 4 x 4 in float32.

    ``small``: for the simulator, where a thread costs a thread of the machine."""
    if small:
        return Tile(8, 4, 4, 2, 8, 8)
    wide = 32 if e <= 32 else 64
    if kind is np.float64:
        return Tile(32, 32, 16, 8, 32, wide)
    if e > 64:
        return Tile(64, 32, 16, 16, 32, 128)  # 16 threads across, for want of registers
    return Tile(64, 32, 16, 8, 32 if d <= 32 else 64, wide)


def made_of(kind):
    """A kind as arrays in shared memory and in registers want it."""
    return numba.float32 if kind is np.float32 else numba.float64


@functools.cache
def make_load(rows, columns, threads, kind):
    """A tile comes from global memory: thread t has column t % columns of every
    (threads / columns)-th row.

    Rows past the last are copies of it, and columns that are not there are 0. Returns whether some
    number was not finite."""
    step, largest, zero = threads // columns, kind(np.finfo(kind).max), kind(0)
    sign = 2**31 - 1  # clears it: the compiler then knows that no index is negative

    @cuda.jit(device=True)
    def load(x, at, first, last, column, thread, into):
        c, wild = thread & (columns - 1), False
        inside = column + c < x.shape[2]
        for t in range(rows // step):
            r = thread // columns + t * step
            i = min(first + r, last - 1) & sign
            number = x[at & sign, i, (column + c) & sign] if inside else zero
            wild |= not (abs(number) <= largest)
            into[r, c] = number
        return wild

    return load


@functools.cache
def make_dots(rows, keys, down, across, columns):
    """s += X Z^T: queries y + down a with keys x + across b, eight columns a step."""

    @cuda.jit(device=True)
    def dots(xs, zs, y, x, s):
        for step in range(0, columns, 8):
            c = step & (columns - 1)  # so that the compiler knows it is not negative
            for b in range(keys // across):
                j = x + across * b
                z0, z1, z2, z3 = zs[j, c], zs[j, c + 1], zs[j, c + 2], zs[j, c + 3]
                z4, z5, z6, z7 = zs[j, c + 4], zs[j, c + 5], zs[j, c + 6], zs[j, c + 7]
                for a in range(rows // down):
                    i = y + down * a
                    total = s[a, b] + xs[i, c] * z0
                    total += xs[i, c + 1] * z1
                    total += xs[i, c + 2] * z2
                    total += xs[i, c + 3] * z3
                    total += xs[i, c + 4] * z4
                    total += xs[i, c + 5] * z5
                    total += xs[i, c + 6] * z6
                    s[a, b] = total + xs[i, c + 7] * z7

    return dots


@functools.cache
def make_product(rows, keys, down, across, columns):
    """acc += P X for queries y + down a, and columns 4 x to 4 x + 3 of every 4 * across."""

    @cuda.jit(device=True)
    def product(ps, xs, y, x, acc):
        for step in range(0, keys, 4):
            j = step & (keys - 1)
            for g in range(columns // (4 * across)):
                c = 4 * (across * g + x)
                for a in range(rows // down):
                    i = y + down * a
                    p0, p1, p2, p3 = ps[i, j], ps[i, j + 1], ps[i, j + 2], ps[i, j + 3]
                    for w in range(4):
                        total = acc[a, 4 * g + w] + p0 * xs[j, c + w]
                        total += p1 * xs[j + 1, c + w]
                        total += p2 * xs[j + 2, c + w]
                        acc[a, 4 * g + w] = total + p3 * xs[j + 3, c + w]

    return product


@functools.cache
def make_careful_product(rows, keys, down, across, columns):
    """``make_product`` for pairs that are seen alone, since 0 * NaN is NaN."""

    @cuda.jit(device=True)
    def product(ps, xs, seen, y, x, acc):
        for j in range(keys):
            for a in range(rows // down):
                i = y + down * a
                if seen[i, j]:
                    for c in range(columns // across):
                        acc[a, c] += ps[i, j] * xs[j, 4 * (across * (c // 4) + x) + c % 4]

    return product


@functools.cache
def make_addend(given, kind):
    """What is added to the score of query i, row r of its tile, and key j: the bias or 0, and -inf
    where the span, the mask or the bias hides the pair."""
    has_mask, has_bias, _ = given
    hidden, zero = kind(-np.inf), kind(0)

    @cuda.jit(device=True)
    def addend(low, high, mask, bias, of_mask, of_bias, r, i, j):
        if j < low[r] or j >= high[r]:
            return hidden
        if has_mask:
            down, across = min(1, mask.shape[1] - 1), min(1, mask.shape[2] - 1)
            if not mask[of_mask, i * down, j * across]:
                return hidden
        if has_bias:
            down, across = min(1, bias.shape[1] - 1), min(1, bias.shape[2] - 1)
            return bias[of_bias, i * down, j * across]
        return zero

    return addend


@functools.cache
def make_attend(tile, sliced, given, kind):
    """The forward kernel for a tile, with q and k in slices of tile.d columns where ``sliced``."""
    rows, keys, down, across, D, E = tile
    has_mask, has_bias, has_softcap = given
    threads, number, always = tile.threads, made_of(kind), given.mask or given.bias
    down_a, across_b, columns = rows // down, keys // across, E // across
    wide, deep, aligned = D + PAD, keys + PAD, ALIGNED
    zero, one, least, log2e = kind(0), kind(1), kind(-np.inf), kind(LOG2E)
    load_q, load_k = make_load(rows, D, threads, kind), make_load(keys, D, threads, kind)
    load_v, dots = make_load(keys, E, threads, kind), make_dots(rows, keys, down, across, D)
    product = make_product(rows, keys, down, across, E)
    careful_product = make_careful_product(rows, keys, down, across, E)
    addend = make_addend(given, kind)

    @cuda.jit
    def attend(q, k, v, mask, bias, spans, heads, numbers, y, lse):
        """y (H, n, e) and lse (H, n) are written.

        Grid: a block for each tile of queries, head and slice of tile.e columns of v, those of the
        last queries first, since causal ones have most to do. q (., n, d), k (., m, d),
        v (., m, e), mask and bias (., n or 1, m or 1), spans (., n, 2): row h of ``heads`` (H, 6)
        says which of each belongs to head h. Query i sees the keys of its span, first to last + 1,
        that mask and bias leave. Row by row, with the largest score so far as ``top``,

            total = total 2**(log2 e (old top - top)) + sum_j p_j,  p_j = 2**(log2 e (s_j - top))

        and the same for the sums of p_j v_j.
        """
        if aligned:
            qs = cuda.shared.array((rows, wide), number, 16)
            ks = cuda.shared.array((keys, wide), number, 16)
            vs = cuda.shared.array((keys, E), number, 16)
            ps = cuda.shared.array((rows, deep), number, 16)
            tops = cuda.shared.array((rows, across), number, 16)
        else:
            qs = cuda.shared.array((rows, wide), number)
            ks = cuda.shared.array((keys, wide), number)
            vs = cuda.shared.array((keys, E), number)
            ps = cuda.shared.array((rows, deep), number)
            tops = cuda.shared.array((rows, across), number)
        seen = cuda.shared.array((rows, keys), numba.boolean)
        low = cuda.shared.array(rows, numba.int32)
        high = cuda.shared.array(rows, numba.int32)
        s = cuda.local.array((down_a, across_b), number)
        acc = cuda.local.array((down_a, columns), number)
        top = cuda.local.array(down_a, number)
        total = cuda.local.array(down_a, number)
        thread = cuda.threadIdx.x
        tx, ty = thread & (across - 1), (thread // across) & (down - 1)
        n, d, e, (scale, softcap) = q.shape[1], q.shape[2], v.shape[2], numbers
        parts = max(1, (e + E - 1) // E)
        h = cuda.blockIdx.x // parts % len(heads)
        c0 = E * (cuda.blockIdx.x % parts)
        i0 = rows * ((n + rows - 1) // rows - 1 - cuda.blockIdx.x // (parts * len(heads)))
        of_q, of_k, of_v = heads[h, 0], heads[h, 1], heads[h, 2]
        of_mask, of_bias, of_spans = heads[h, 3], heads[h, 4], heads[h, 5]
        for a in range(down_a):
            top[a], total[a] = least, zero
            for c in range(columns):
                acc[a, c] = zero
        for r in range(thread, rows, threads):
            i = min(i0 + r, n - 1)  # rows that are not there stand for the last one
            low[r], high[r] = spans[of_spans, i, 0], spans[of_spans, i, 1]
        if not sliced:
            load_q(q, of_q, i0, n, 0, thread, qs)
        cuda.syncthreads()
        first, all_from, all_to, last = low[0], low[0], high[0], high[0]
        for r in range(1, rows):
            first, all_from = min(first, low[r]), max(all_from, low[r])
            all_to, last = min(all_to, high[r]), max(last, high[r])
        for j0 in range(first, last, keys):
            cuda.syncthreads()  # everyone has finished with the tile before
            wild = load_v(v, of_v, j0, last, c0, thread, vs)
            for a in range(down_a):
                for b in range(across_b):
                    s[a, b] = zero
            for c in range(0, d if sliced else 1, D):
                if sliced:
                    if c > 0:
                        cuda.syncthreads()
                    load_q(q, of_q, i0, n, c, thread, qs)
                load_k(k, of_k, j0, last, c, thread, ks)
                cuda.syncthreads()
                dots(qs, ks, ty, tx, s)
            partly = always or j0 < all_from or j0 + keys > all_to
            for a in range(down_a):
                r = ty + down * a
                largest = least
                for b in range(across_b):
                    score = scale * s[a, b]
                    if has_softcap:
                        score = softcap * kind(math.tanh(score / softcap))
                    if partly:
                        i, j = min(i0 + r, n - 1), j0 + tx + across * b
                        more = addend(low, high, mask, bias, of_mask, of_bias, r, i, j)
                        seen[r, tx + across * b] = more != least
                        score = score + more if more != least else least
                    s[a, b] = score
                    largest = max(largest, score)
                tops[r, tx] = largest
            wild = cuda.syncthreads_or(numba.int32(wild)) != 0
            for a in range(down_a):
                r = ty + down * a
                largest = top[a]
                for x in range(across):
                    largest = max(largest, tops[r, x])
                base = largest if largest > least else zero
                share = kind(math.exp2((top[a] - base) * log2e))
                total[a] *= share
                for b in range(across_b):
                    p = kind(math.exp2((s[a, b] - base) * log2e))
                    total[a] += p
                    ps[r, tx + across * b] = p
                for c in range(columns):
                    acc[a, c] *= share
                top[a] = largest
            cuda.syncthreads()
            if wild and partly:
                careful_product(ps, vs, seen, ty, tx, acc)
            else:
                product(ps, vs, ty, tx, acc)
        for a in range(down_a):
            tops[ty + down * a, tx] = total[a]  # this thread's share of it
        cuda.syncthreads()
        for a in range(down_a):
            i, whole = i0 + ty + down * a, zero
            for x in range(across):
                whole += tops[ty + down * a, x]
            share = one / whole if whole != zero else zero
            if i < n:
                for c in range(columns):
                    column = c0 + 4 * (across * (c // 4) + tx) + c % 4
                    if column < e:
                        y[h, i, column] = acc[a, c] * share
                if tx == 0 and c0 == 0:
                    base = top[a] if top[a] > least else zero
                    lse[h, i] = base + kind(math.log(whole)) if whole != zero else least

    return attend
