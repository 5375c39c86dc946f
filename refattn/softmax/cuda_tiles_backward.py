"""The gradient of ``refattn.softmax.cuda_tiles``: each tile of weights is computed again.

With P = exp(S - lse): dV = P^T dY, dS = P (dY V^T - delta), delta = rowsum(dY Y) - dlse,
dQ = scale dS K, dK = scale dS^T Q. The kernel here owns tiles of keys and goes over the queries,
the one in ``cuda_tiles_queries`` owns tiles of queries and goes over the keys: every sum has one
owner and one order.
"""

import functools
import math

import numba
import numpy as np

from refattn import gpu
from refattn.gpu import cuda
from refattn.scalars import LOG2E
from refattn.softmax.cuda_tiles import (
    ALIGNED,
    PAD,
    Tile,
    made_of,
    make_addend,
    make_dots,
    make_load,
)


def tile_of(kind, small=gpu.SIMULATED):
    """The backward tile: micro-tiles of 4 x 4 in float32, all columns of d, e <= 64 at once."""
    if small:
        return Tile(8, 4, 4, 2, 8, 8)
    return Tile(16, 32, 16, 8, 32, 32) if kind is np.float64 else Tile(32, 32, 8, 8, 64, 64)


@functools.cache
def make_before(rows, has_dlse, kind):
    """What both kernels need of each row, and of each tile of ``rows`` queries."""
    zero, least, most = kind(0), kind(-np.inf), kind(np.inf)

    @cuda.jit
    def before(dy, y, lse, dlse, spans, shifts, bounds):
        """shifts (2, H, n) = lse, and rowsum(dY Y) - dlse; an lse of -inf, where a row has seen
        nothing, becomes +inf, so that its weights are 0. bounds (., tiles, 4) = (least first,
        largest first, least last, largest last) of the spans (., n, 2) in a tile.

        Grid: a block for each tile and head, a thread for each row.
        """
        n = dy.shape[1]
        h, tile = cuda.blockIdx.x % len(dy), cuda.blockIdx.x // len(dy)
        i = rows * tile + cuda.threadIdx.x
        if i < n:
            delta = zero
            for c in range(dy.shape[2]):
                delta += dy[h, i, c] * y[h, i, c]
            if has_dlse:
                delta -= dlse[h, i]
            shifts[0, h, i] = lse[h, i] if lse[h, i] != least else most
            shifts[1, h, i] = delta
        if h < len(spans) and cuda.threadIdx.x == 0:
            a, b = spans[h, rows * tile, 0], spans[h, rows * tile, 1]
            first, all_from, all_to, last = a, a, b, b
            for r in range(rows * tile, min(rows * tile + rows, n)):
                a, b = spans[h, r, 0], spans[h, r, 1]
                first, all_from = min(first, a), max(all_from, a)
                all_to, last = min(all_to, b), max(last, b)
            bounds[h, tile, 0], bounds[h, tile, 1] = first, all_from
            bounds[h, tile, 2], bounds[h, tile, 3] = all_to, last

    return before


@functools.cache
def make_product_across(rows, keys, down, across, columns):
    """acc += P^T X for the keys / down neighbouring keys of thread row y; columns as in
    ``make_product``."""
    own = keys // down

    @cuda.jit(device=True)
    def product(ps, xs, y, x, acc):
        for step in range(0, rows, 4):
            i = step & (rows - 1)
            for g in range(columns // (4 * across)):
                c = 4 * (across * g + x)
                for b in range(own):
                    j = own * y + b
                    p0, p1, p2, p3 = ps[i, j], ps[i + 1, j], ps[i + 2, j], ps[i + 3, j]
                    for w in range(4):
                        total = acc[b, 4 * g + w] + p0 * xs[i, c + w]
                        total += p1 * xs[i + 1, c + w]
                        total += p2 * xs[i + 2, c + w]
                        acc[b, 4 * g + w] = total + p3 * xs[i + 3, c + w]

    return product


@functools.cache
def make_careful_product_across(rows, keys, down, across, columns):
    """``make_product_across`` for pairs that are seen alone."""
    own = keys // down

    @cuda.jit(device=True)
    def product(ps, xs, seen, y, x, acc):
        for i in range(rows):
            for b in range(own):
                j = own * y + b
                if seen[i, j]:
                    for c in range(columns // across):
                        acc[b, c] += ps[i, j] * xs[i, 4 * (across * (c // 4) + x) + c % 4]

    return product


@functools.cache
def make_weigh(tile, given, kind):
    """From scores q k and dy v to weights p and gradients ds, in place, in each thread's registers.

    ds is the gradient of the score as the bias sees it; the softcap's slope is left in ``slope``.
    Both are 0 where the pair is hidden.
    """
    rows, keys, down, across, *_ = tile
    zero, one, least, log2e = kind(0), kind(1), kind(-np.inf), kind(LOG2E)
    has_softcap, addend = given.softcap, make_addend(given, kind)

    @cuda.jit(device=True)
    def weigh(s, dp, slope, seen, low, high, mask, bias, of_mask, of_bias, numbers, shifts, where):
        h, i0, j0, ty, tx, partly = where
        scale, softcap = numbers
        n = shifts.shape[2]
        for a in range(rows // down):
            r = ty + down * a
            i = min(i0 + r, n - 1)
            shift, delta = shifts[0, h, i], shifts[1, h, i]
            for b in range(keys // across):
                j, shown, more = tx + across * b, True, zero
                score = scale * s[a, b]
                if has_softcap:
                    t = kind(math.tanh(score / softcap))
                    score, slope[a, b] = softcap * t, one - t * t
                if partly:
                    if i0 + r < n:
                        more = addend(low, high, mask, bias, of_mask, of_bias, r, i, j0 + j)
                    else:
                        more = least
                    shown = more != least
                    seen[r, j] = shown
                    score = score + more
                p = kind(math.exp2((score - shift) * log2e))
                s[a, b] = p if shown else zero
                dp[a, b] = p * (dp[a, b] - delta) if shown else zero
                if has_softcap:
                    slope[a, b] = slope[a, b] if shown else zero

    return weigh


@functools.cache
def make_attend_keys(tile, sliced, given, kind):
    """The kernel for dk and dv; d and e in slices of tile.d and tile.e columns where ``sliced``."""
    rows, keys, down, across, D, E = tile
    always, has_softcap = given.mask or given.bias, given.softcap
    threads, number, zero, aligned = tile.threads, made_of(kind), kind(0), ALIGNED
    down_a, across_b, own = rows // down, keys // across, keys // down
    wide, wide_e, deep = D + PAD, E + PAD, keys + PAD
    slope_a, slope_b = (down_a, across_b) if has_softcap else (1, 1)
    columns, columns_e, far = D // across, E // across, 2**31 - 1
    load_q, load_k = make_load(rows, D, threads, kind), make_load(keys, D, threads, kind)
    load_dy, load_v = make_load(rows, E, threads, kind), make_load(keys, E, threads, kind)
    dots = make_dots(rows, keys, down, across, D)
    dots_e = make_dots(rows, keys, down, across, E)
    weigh = make_weigh(tile, given, kind)
    shape = rows, keys, down, across
    to_k, to_v = (make_product_across(*shape, c) for c in (D, E))
    careful_to_k, careful_to_v = (make_careful_product_across(*shape, c) for c in (D, E))

    @cuda.jit
    def attend_keys(
        dy, q, k, v, mask, bias, spans, heads, bounds, numbers, shifts, dk, dv
    ):  # fmt: skip
        """dk (H, m, d) and dv (H, m, e) are written.

        Grid: a block for each tile of keys, head and slice z of columns, of dk and of dv. For S all
        slices of q and k are gone through, its own last, so that it is there for dk; so for
        dY V^T. Tiles of queries of which none sees a key of this tile are left out.
        """
        if aligned:
            qs = cuda.shared.array((rows, wide), number, 16)
            ks = cuda.shared.array((keys, wide), number, 16)
            vs = cuda.shared.array((keys, wide_e), number, 16)
            dys = cuda.shared.array((rows, wide_e), number, 16)
            ps = cuda.shared.array((rows, deep), number, 16)
            dss = cuda.shared.array((rows, deep), number, 16)
        else:
            qs = cuda.shared.array((rows, wide), number)
            ks = cuda.shared.array((keys, wide), number)
            vs = cuda.shared.array((keys, wide_e), number)
            dys = cuda.shared.array((rows, wide_e), number)
            ps = cuda.shared.array((rows, deep), number)
            dss = cuda.shared.array((rows, deep), number)
        seen = cuda.shared.array((rows, keys), numba.boolean)
        low = cuda.shared.array(rows, numba.int32)
        high = cuda.shared.array(rows, numba.int32)
        met = cuda.shared.array((2, threads), numba.int32)
        s = cuda.local.array((down_a, across_b), number)
        dp = cuda.local.array((down_a, across_b), number)
        slope = cuda.local.array((slope_a, slope_b), number)
        acc_k = cuda.local.array((own, columns), number)
        acc_v = cuda.local.array((own, columns_e), number)
        thread = cuda.threadIdx.x
        tx, ty = thread & (across - 1), (thread // across) & (down - 1)
        n, m, d, e = q.shape[1], k.shape[1], q.shape[2], v.shape[2]
        parts_d, parts_e = (d + D - 1) // D, (e + E - 1) // E
        parts = max(parts_d, parts_e)
        z, h = cuda.blockIdx.x % parts, cuda.blockIdx.x // parts % len(heads)
        j0 = keys * (cuda.blockIdx.x // (parts * len(heads)))
        of_q, of_k, of_v = heads[h, 0], heads[h, 1], heads[h, 2]
        of_mask, of_bias, of_spans = heads[h, 3], heads[h, 4], heads[h, 5]
        for b in range(own):
            for c in range(columns):
                acc_k[b, c] = zero
            for c in range(columns_e):
                acc_v[b, c] = zero
        start, stop = far, 0
        for t in range(thread, bounds.shape[1], threads):
            if bounds[of_spans, t, 0] < j0 + keys and bounds[of_spans, t, 3] > j0:
                start, stop = min(start, t), t + 1
        met[0, thread], met[1, thread] = start, stop
        if not sliced:
            load_k(k, of_k, j0, m, 0, thread, ks)
            load_v(v, of_v, j0, m, 0, thread, vs)
        cuda.syncthreads()
        for t in range(threads):
            start, stop = min(start, met[0, t]), max(stop, met[1, t])
        for t in range(start, stop):
            if bounds[of_spans, t, 0] >= j0 + keys or bounds[of_spans, t, 3] <= j0:
                continue
            i0, wild = rows * t, False
            for a in range(down_a):
                for b in range(across_b):
                    s[a, b], dp[a, b] = zero, zero
            cuda.syncthreads()  # everyone has finished with the tile before
            for r in range(thread, rows, threads):
                i = min(i0 + r, n - 1)
                low[r], high[r] = spans[of_spans, i, 0], spans[of_spans, i, 1]
            for part in range(parts_d if sliced else 1):
                c = D * ((z + 1 + part) % parts_d) if sliced else 0
                if part > 0:
                    cuda.syncthreads()
                wild |= load_q(q, of_q, i0, n, c, thread, qs)
                if sliced:
                    load_k(k, of_k, j0, m, c, thread, ks)
                cuda.syncthreads()
                dots(qs, ks, ty, tx, s)
            for part in range(parts_e if sliced else 1):
                c = E * ((z + 1 + part) % parts_e) if sliced else 0
                if part > 0:
                    cuda.syncthreads()
                wild |= load_dy(dy, h, i0, n, c, thread, dys)
                if sliced:
                    load_v(v, of_v, j0, m, c, thread, vs)
                cuda.syncthreads()
                dots_e(dys, vs, ty, tx, dp)
            partly = (
                always
                or j0 < bounds[of_spans, t, 1]
                or j0 + keys > bounds[of_spans, t, 2]
                or i0 + rows > n
            )
            where = h, i0, j0, ty, tx, partly
            weigh(
                s, dp, slope, seen, low, high, mask, bias, of_mask, of_bias, numbers, shifts, where
            )
            for a in range(down_a):
                for b in range(across_b):
                    ps[ty + down * a, tx + across * b] = s[a, b]
                    ds = dp[a, b] * slope[a, b] if has_softcap else dp[a, b]
                    dss[ty + down * a, tx + across * b] = ds
            if cuda.syncthreads_or(numba.int32(wild)) and partly:
                careful_to_v(ps, dys, seen, ty, tx, acc_v)
                careful_to_k(dss, qs, seen, ty, tx, acc_k)
            else:
                to_v(ps, dys, ty, tx, acc_v)
                to_k(dss, qs, ty, tx, acc_k)
        for b in range(own):
            j = j0 + own * ty + b
            for c in range(columns):
                column = D * z + 4 * (across * (c // 4) + tx) + c % 4
                if j < m and column < d:
                    dk[h, j, column] = acc_k[b, c] * numbers[0]
            for c in range(columns_e):
                column = E * z + 4 * (across * (c // 4) + tx) + c % 4
                if j < m and column < e:
                    dv[h, j, column] = acc_v[b, c]

    return attend_keys
