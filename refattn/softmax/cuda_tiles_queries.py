"""The gradient of ``refattn.softmax.cuda_tiles`` with respect to the queries and the bias."""

import functools

import numba

from refattn.gpu import cuda
from refattn.softmax.cuda_tiles import (
    ALIGNED,
    PAD,
    made_of,
    make_careful_product,
    make_dots,
    make_load,
    make_product,
)
from refattn.softmax.cuda_tiles_backward import make_weigh


@functools.cache
def make_attend_queries(tile, sliced, given, kind):
    """The kernel for dq and the gradient of the bias; otherwise as ``make_attend_keys``."""
    rows, keys, down, across, D, E = tile
    always, has_bias, has_softcap = given.mask or given.bias, given.bias, given.softcap
    threads, number, zero, aligned = tile.threads, made_of(kind), kind(0), ALIGNED
    down_a, across_b, columns = rows // down, keys // across, D // across
    wide, wide_e, deep = D + PAD, E + PAD, keys + PAD
    slope_a, slope_b = (down_a, across_b) if has_softcap else (1, 1)
    load_q, load_k = make_load(rows, D, threads, kind), make_load(keys, D, threads, kind)
    load_dy, load_v = make_load(rows, E, threads, kind), make_load(keys, E, threads, kind)
    dots = make_dots(rows, keys, down, across, D)
    dots_e = make_dots(rows, keys, down, across, E)
    weigh = make_weigh(tile, given, kind)
    product = make_product(rows, keys, down, across, D)
    careful_product = make_careful_product(rows, keys, down, across, D)

    @cuda.jit
    def attend_queries(
        dy, q, k, v, mask, bias, spans, heads, bounds, numbers, shifts, dq, dbias
    ):  # fmt: skip
        """dq (H, n, d) is written, and dbias (H, n, m) where a pair is seen, if a bias came.

        Grid: a block for each tile of queries, those of the last queries first, head and slice z of
        dq's columns.
        """
        if aligned:
            qs = cuda.shared.array((rows, wide), number, 16)
            ks = cuda.shared.array((keys, wide), number, 16)
            vs = cuda.shared.array((keys, wide_e), number, 16)
            dys = cuda.shared.array((rows, wide_e), number, 16)
            dss = cuda.shared.array((rows, deep), number, 16)
        else:
            qs = cuda.shared.array((rows, wide), number)
            ks = cuda.shared.array((keys, wide), number)
            vs = cuda.shared.array((keys, wide_e), number)
            dys = cuda.shared.array((rows, wide_e), number)
            dss = cuda.shared.array((rows, deep), number)
        seen = cuda.shared.array((rows, keys), numba.boolean)
        low = cuda.shared.array(rows, numba.int32)
        high = cuda.shared.array(rows, numba.int32)
        s = cuda.local.array((down_a, across_b), number)
        dp = cuda.local.array((down_a, across_b), number)
        slope = cuda.local.array((slope_a, slope_b), number)
        acc = cuda.local.array((down_a, columns), number)
        thread = cuda.threadIdx.x
        tx, ty = thread & (across - 1), (thread // across) & (down - 1)
        n, d, e = q.shape[1], q.shape[2], v.shape[2]
        parts_d, parts_e = (d + D - 1) // D, (e + E - 1) // E
        z, h = cuda.blockIdx.x % parts_d, cuda.blockIdx.x // parts_d % len(heads)
        t = bounds.shape[1] - 1 - cuda.blockIdx.x // (parts_d * len(heads))
        of_q, of_k, of_v = heads[h, 0], heads[h, 1], heads[h, 2]
        of_mask, of_bias, of_spans = heads[h, 3], heads[h, 4], heads[h, 5]
        i0, last = rows * t, bounds[of_spans, t, 3]
        for a in range(down_a):
            for c in range(columns):
                acc[a, c] = zero
        for r in range(thread, rows, threads):
            i = min(i0 + r, n - 1)
            low[r], high[r] = spans[of_spans, i, 0], spans[of_spans, i, 1]
        if not sliced:
            load_q(q, of_q, i0, n, 0, thread, qs)
            load_dy(dy, h, i0, n, 0, thread, dys)
        for j0 in range(bounds[of_spans, t, 0], last, keys):
            wild = False
            for a in range(down_a):
                for b in range(across_b):
                    s[a, b], dp[a, b] = zero, zero
            # No barrier between tiles: vs was last read before one, and ks is loaded after one.
            for part in range(parts_e if sliced else 1):
                c = E * part
                if part > 0:
                    cuda.syncthreads()
                if sliced:
                    load_dy(dy, h, i0, n, c, thread, dys)
                load_v(v, of_v, j0, last, c, thread, vs)
                cuda.syncthreads()
                dots_e(dys, vs, ty, tx, dp)
            for part in range(parts_d if sliced else 1):
                c = D * ((z + 1 + part) % parts_d) if sliced else 0
                if part > 0:
                    cuda.syncthreads()
                if sliced:
                    load_q(q, of_q, i0, n, c, thread, qs)
                wild |= load_k(k, of_k, j0, last, c, thread, ks)
                cuda.syncthreads()
                dots(qs, ks, ty, tx, s)
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
                r = ty + down * a
                for b in range(across_b):
                    j = tx + across * b
                    if has_bias and z == 0 and seen[r, j]:
                        dbias[h, i0 + r, j0 + j] = dp[a, b]
                    dss[r, j] = dp[a, b] * slope[a, b] if has_softcap else dp[a, b]
            if cuda.syncthreads_or(numba.int32(wild)) and partly:
                careful_product(dss, ks, seen, ty, tx, acc)
            else:
                product(dss, ks, ty, tx, acc)
        for a in range(down_a):
            i = i0 + ty + down * a
            for c in range(columns):
                column = D * z + 4 * (across * (c // 4) + tx) + c % 4
                if i < n and column < d:
                    dq[h, i, column] = acc[a, c] * numbers[0]

    return attend_queries
