"""The gradient of ``refattn.linear.cuda_tiles``: what reaches features, tile by tile.

With y = num / den, num = phi_q S + tril(phi_q phi_k^T) v and den likewise with z and 1:

    dphi_q = dnum S^T + dden z + tril(dnum v^T + dden 1) phi_k,
    dphi_k = v R^T + u + triu(v dnum^T + 1 dden) phi_q,
    dv     = phi_k R + triu(phi_k phi_q^T) dnum,

where R = sum phi_q dnum^T and u = sum phi_q dden run over the queries of later spans, or over all
in the full form. R and u are ``sums`` over queries, dv is a ``read`` of R; the rest is here.
"""

import functools
import math

from refattn.gpu import cuda
from refattn.linear.cuda_maps import (
    POSITIVE,
    TRIG,
    make_feature_vjp,
    make_hidden,
    make_line_of,
    make_load,
    make_load_values,
    make_shift_of,
    real,
)
from refattn.linear.cuda_tiles import make_multiply, make_pair


@functools.cache
def make_pull(kind, of, query, causal, sizes):
    """dx (H, n, r): the gradient of what features are made of. For exponentials it is that of
    their exponents, for sines that of the sine.

    Launch: one block of (side, side) threads for each (head, span, tile of rows, tile of
    features); a thread owns rows ty, ty + side, ... and features tx, tx + side, ... of its tile.
    ``rows``, ``others``, ``base``, ``tops`` and ``careful`` as in ``read``; ``state`` is S and z
    for queries, R and u for keys.
    """
    tile, depth, columns, side, _ = sizes
    M, N, threads, T, zero = tile // side, columns // side, side * side, real(kind), kind(0)
    load = make_load(kind, of, not query, depth, columns, threads)
    load_values = make_load_values(kind, query, tile, depth, threads)
    weigh = make_pulls(kind, of, query, sizes)
    add_pairs = make_add_pairs(kind, of, query, sizes)
    finish = make_finish(kind, of, query, causal)
    square, padded, broad = tile + 1, depth + 1, columns + 1  # rows start in different banks

    @cuda.jit
    def pull(rows, others, state, base, tops, careful, span, dx):
        S, z = state
        A = cuda.shared.array((tile, square), T)
        F = cuda.shared.array((tile, padded), T)
        G = cuda.shared.array((tile, padded), T)
        B = cuda.shared.array((depth, broad), T)
        acc = cuda.local.array((M, N), T)
        inner = cuda.local.array((M, N), T)
        w = cuda.local.array((M, M), T)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        thread = ty * side + tx
        n, spans, r, e = rows[0].shape[1], S.shape[1], S.shape[2], S.shape[3]
        tiles, cuts = (span + tile - 1) // tile, (r + columns - 1) // columns
        t = cuda.blockIdx.x // cuts
        f0 = (cuda.blockIdx.x - t * cuts) * columns
        h, s = t // tiles // spans, t // tiles % spans
        start = s * span
        i0, end = start + (t % tiles) * tile, min(start + span, n)
        if i0 >= end:
            return
        for a in range(M):
            for b in range(N):
                acc[a, b] = zero
                inner[a, b] = zero
        for c0 in range(0, e, depth):
            cuda.syncthreads()
            load_values(rows, h, i0, end, c0, thread, G)
            for k in range(thread, depth * columns, threads):
                f = k // depth  # neighbours in memory to neighbouring threads
                c = k - f * depth
                B[c, f] = S[h, s, f0 + f, c0 + c] if f0 + f < r and c0 + c < e else zero
            cuda.syncthreads()
            for c in range(depth):
                for a in range(M):
                    for b in range(N):
                        acc[a, b] += G[ty + side * a, c] * B[c, tx + side * b]
        for a in range(M):
            i = i0 + ty + side * a
            for b in range(N):
                f = f0 + tx + side * b
                if i < end and f < r:
                    acc[a, b] += rows[3][rows[4][h, 3], i] * z[h, s, f]
        raw = causal and (of == TRIG or (of == POSITIVE and careful[h, s] != 0))
        if causal:
            low, high = (start, i0 + 1) if query else (i0, end)
            for j0 in range(low, high, tile):
                weigh(rows, others, h, i0, j0, end, F, G, w)
                for a in range(M):
                    for b in range(M):
                        A[ty + side * a, tx + side * b] = w[a, b]
                for k in range(0, tile, depth):
                    cuda.syncthreads()
                    load(others, h, j0 + k, end, f0, tops, s, raw, thread, B)
                    cuda.syncthreads()
                    add_pairs(rows, h, A, B, i0, j0, k, f0, end, raw, inner)
        for a in range(M):
            i = i0 + ty + side * a
            for b in range(N):
                f = f0 + tx + side * b
                if i < end and f < r:
                    dx[h, i, f] = finish(rows, h, s, i, f, base, tops, raw, acc[a, b], inner[a, b])

    return pull


def make_pulls(kind, of, query, sizes):
    """``weigh(rows, others, h, i0, j0, end, F, G, w)``: the gradient of the weight of each pair,
    dnum . v + dden; 0 where a pair may not see each other."""
    tile, depth, _, side, _ = sizes
    M, threads, zero = tile // side, side * side, kind(0)
    load_values = make_load_values(kind, query, tile, depth, threads)
    load_others = make_load_values(kind, not query, tile, depth, threads)
    pair = make_pair(kind, of, query)

    @cuda.jit(device=True)
    def weigh(rows, others, h, i0, j0, end, F, G, w):
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        thread = ty * side + tx
        for a in range(M):
            for b in range(M):
                w[a, b] = zero
        for c in range(0, rows[2].shape[2], depth):
            cuda.syncthreads()
            load_values(rows, h, i0, end, c, thread, F)
            load_others(others, h, j0, end, c, thread, G)
            cuda.syncthreads()
            for k in range(depth):
                for a in range(M):
                    for b in range(M):
                        w[a, b] += F[ty + side * a, k] * G[tx + side * b, k]
        for a in range(M):
            for b in range(M):
                i, j = i0 + ty + side * a, j0 + tx + side * b
                if i < end and j < end and ((j <= i) == query or i == j):
                    more = rows[3][rows[4][h, 3], i] * others[3][others[4][h, 3], j]
                    w[a, b] = pair(rows, others, h, i, j, w[a, b] + more)
                else:
                    w[a, b] = zero

    return weigh


def make_add_pairs(kind, of, query, sizes):
    """``add_pairs(rows, h, A, B, i0, j0, k, f0, end, raw, acc)``: acc += A[:, k:] B as ``multiply``
    does, or, where exponents came raw, with exp of their sum in place of B."""
    tile, depth, columns, side, _ = sizes
    M, N = tile // side, columns // side
    multiply, line_of = make_multiply(kind, query, sizes), make_line_of(kind, of, query)

    @cuda.jit(device=True)
    def add_pairs(rows, h, A, B, i0, j0, k, f0, end, raw, acc):
        if of != POSITIVE or not raw:
            multiply(A, B, i0, j0, k, acc)
            return
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        x, own, r = rows[0], rows[4][h, 0], rows[0].shape[2]
        for j in range(depth):
            for a in range(M):
                row = ty + side * a
                i = i0 + row
                if i < end and ((j0 + k + j <= i) == query or j0 + k + j == i):
                    line = line_of(rows, h, i)
                    for b in range(N):
                        c = tx + side * b
                        if f0 + c < r:
                            exponent = (x[own, i, f0 + c] + line) + B[j, c]
                            acc[a, b] += A[row, k + j] * math.exp(exponent)

    return add_pairs


def make_finish(kind, of, query, causal):
    """``finish(rows, h, s, i, f, base, tops, raw, far, near)``: from what reaches a feature, by the
    state and inside the span, to the gradient of x."""
    zero = kind(0)
    pulled, line_of = make_feature_vjp(kind, of), make_line_of(kind, of, query)
    shift_of, hidden = make_shift_of(kind, of, query), make_hidden(query)

    @cuda.jit(device=True)
    def finish(rows, h, s, i, f, base, tops, raw, far, near):
        if hidden(rows, h, i):
            return zero
        x, line = rows[0][rows[4][h, 0], i, f], line_of(rows, h, i)
        found = pulled(far, x, line, shift_of(base, h, s, f))
        if causal and raw:  # exponents are in it
            found += near
        elif causal:
            found += pulled(near, x, line, shift_of(tops, h, s, f))
        return found

    return finish
