"""Attention over features as CUDA kernels: linear attention and Performer.

    sums   S = sum phi v^T (r, e) and z = sum phi (r) of each span of positions;
    scan   S and z before each span, from those of each: sums over all spans ahead;
    read   y = (phi_q S + tril(phi_q phi_k^T) v) / (phi_q z + tril(phi_q phi_k^T) 1).

The full form has one span of queries, no tril, and all keys in S. The causal form has a state for
each span, and pairs of positions inside it; all spans run at once. Sides, maps and shifts:
``refattn.linear.cuda_maps``.
"""

import functools
import math

from refattn.gpu import cuda
from refattn.linear.cuda_maps import (
    POSITIVE,
    TRIG,
    make_hidden,
    make_line_of,
    make_load,
    make_load_values,
    real,
)


@functools.cache
def make_sums(kind, of, query, sizes):
    """S and z of each span.

    Launch: one block of (side, side) threads for each (head, span, tile of features, tile of
    columns); a thread owns features ty, ty + side, ... and columns tx, tx + side, ... of its tile
    of S, and walks through the span ``depth`` positions at a time.
    """
    tile, depth, columns, side, _ = sizes
    M, N, threads, T, zero = tile // side, columns // side, side * side, real(kind), kind(0)
    load = make_load(kind, of, query, depth, tile, threads)
    load_values = make_load_values(kind, query, depth, columns, threads)

    @cuda.jit
    def sums(rows, shifts, span, S, z):
        F = cuda.shared.array((depth, tile), T)
        V = cuda.shared.array((depth, columns), T)
        W = cuda.shared.array(depth, T)
        acc = cuda.local.array((M, N), T)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        thread = ty * side + tx
        spans, r, e = S.shape[1], S.shape[2], S.shape[3]
        tiles = (r + tile - 1) // tile
        cuts = max(1, (e + columns - 1) // columns)
        t = cuda.blockIdx.x // cuts
        c0 = (cuda.blockIdx.x - t * cuts) * columns
        f0 = (t % tiles) * tile
        h, s = t // tiles // spans, t // tiles % spans
        first = s * span
        end = min(first + span, rows[0].shape[1])
        weights, own = rows[3], rows[4][h, 3]
        total = zero
        for a in range(M):
            for b in range(N):
                acc[a, b] = zero
        for i in range(first, end, depth):
            cuda.syncthreads()
            load(rows, h, i, end, f0, shifts, s, False, thread, F)
            load_values(rows, h, i, end, c0, thread, V)
            for j in range(thread, depth, threads):
                W[j] = weights[own, i + j] if i + j < end else zero
            cuda.syncthreads()
            for j in range(depth):
                for a in range(M):
                    for b in range(N):
                        acc[a, b] += F[j, ty + side * a] * V[j, tx + side * b]
            if c0 == 0 and thread < tile:
                for j in range(depth):
                    total += F[j, thread] * W[j]
        for a in range(M):
            f = f0 + ty + side * a
            for b in range(N):
                c = c0 + tx + side * b
                if f < r and c < e:
                    S[h, s, f, c] = acc[a, b]
        if c0 == 0 and thread < tile and f0 + thread < r:
            z[h, s, f0 + thread] = total

    return sums


@functools.cache
def make_scan(kind, shifted, reverse):
    """S and z of each span become those of all spans before it, or after it.

    ``last_S``, ``last_z`` come in as what was before the first, and go out as all together. From
    shift to shift sums are multiplied by ``decay`` (H, spans, r).

    Launch: one thread for each entry (head, feature, column) of S and z.
    """

    @cuda.jit
    def scan(decay, S, z, last_S, last_z):
        H, spans, r, e = S.shape
        t = cuda.grid(1)
        if t < H * r * (e + 1):
            row = t // (e + 1)
            c = t - row * (e + 1)
            h = row // r
            f = row - h * r
            carry = last_S[h, f, c] if c < e else last_z[h, f]
            for k in range(spans):
                s = spans - 1 - k if reverse else k
                if c < e:
                    own = S[h, s, f, c]
                    S[h, s, f, c] = carry
                else:
                    own = z[h, s, f]
                    z[h, s, f] = carry
                if shifted:
                    carry *= decay[h, s, f]
                carry += own
            if c < e:
                last_S[h, f, c] = carry
            else:
                last_z[h, f] = carry

    return scan


@functools.cache
def make_weights(kind, of, query, sizes):
    """``weigh(rows, others, h, i0, j0, ends, tops, s, raw, F, G, w)``: phi_row . phi_other of a
    tile of pairs, those of a thread in w. F and G are room in shared memory.

    ``raw``: exponents are added before exp is taken, or the pairs' after: for each pair by itself,
    however far apart the exponents of a span are. Pairs that may not see each other are 0.
    """
    tile, depth, _, side, _ = sizes
    M, threads, zero = tile // side, side * side, kind(0)
    load = make_load(kind, of, query, tile, depth, threads)
    load_others = make_load(kind, of, not query, tile, depth, threads)
    pair = make_pair(kind, of, query)

    @cuda.jit(device=True)
    def weigh(rows, others, h, i0, j0, end, tops, s, raw, F, G, w):
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        thread = ty * side + tx
        for a in range(M):
            for b in range(M):
                w[a, b] = zero
        for f in range(0, rows[0].shape[2], depth):
            cuda.syncthreads()
            load(rows, h, i0, end, f, tops, s, raw, thread, F)
            load_others(others, h, j0, end, f, tops, s, raw, thread, G)
            cuda.syncthreads()
            if of == POSITIVE and raw:
                for a in range(M):
                    for b in range(M):
                        i, j = ty + side * a, tx + side * b
                        if (j0 + j <= i0 + i) == query or j0 + j == i0 + i:
                            for c in range(depth):
                                w[a, b] += math.exp(F[i, c] + G[j, c])
            else:
                for c in range(depth):
                    for a in range(M):
                        for b in range(M):
                            w[a, b] += F[ty + side * a, c] * G[tx + side * b, c]
        for a in range(M):
            for b in range(M):
                i, j = i0 + ty + side * a, j0 + tx + side * b
                if i < end and j < end and ((j <= i) == query or i == j):
                    w[a, b] = pair(rows, others, h, i, j, w[a, b])
                else:
                    w[a, b] = zero

    return weigh


def make_pair(kind, of, query):
    """``pair(rows, others, h, i, j, w)``: the weight of a pair of sines from that without their
    exponents; 0 for a hidden key. Other weights are whole already."""
    zero = kind(0)
    line_row, line_other = make_line_of(kind, of, query), make_line_of(kind, of, not query)
    row_hidden, other_hidden = make_hidden(query), make_hidden(not query)

    @cuda.jit(device=True)
    def pair(rows, others, h, i, j, w):
        if of != TRIG:
            return w
        if row_hidden(rows, h, i) or other_hidden(others, h, j):
            return zero
        return w * math.exp(line_row(rows, h, i) + line_other(others, h, j))

    return pair


def make_multiply(kind, query, sizes):
    """``multiply(A, B, i0, j0, k, acc)``: acc += A[:, k:] B for a tile A of weights and ``depth``
    rows of B. Where a tile holds pairs that may not see each other, those are left out: a weight
    of 0 would let NaN through."""
    tile, depth, columns, side, _ = sizes
    M, N = tile // side, columns // side

    @cuda.jit(device=True)
    def multiply(A, B, i0, j0, k, acc):
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        if i0 != j0:
            for j in range(depth):
                for a in range(M):
                    for b in range(N):
                        acc[a, b] += A[ty + side * a, k + j] * B[j, tx + side * b]
        else:
            for j in range(depth):
                for a in range(M):
                    i = ty + side * a
                    if (k + j <= i) == query or k + j == i:
                        for b in range(N):
                            acc[a, b] += A[i, k + j] * B[j, tx + side * b]

    return multiply


def make_add_state(kind, of, query, quotient, sizes):
    """``add_state(rows, state, base, h, s, i0, end, c0, F, B, Z, acc, line)``: acc += phi S for a
    tile of rows and columns, and line += phi z, of which each thread of a row has a share of the
    features. F, B and Z are room in shared memory."""
    tile, depth, columns, side, _ = sizes
    M, N, threads, zero = tile // side, columns // side, side * side, kind(0)
    load = make_load(kind, of, query, tile, depth, threads)

    @cuda.jit(device=True)
    def add_state(rows, state, base, h, s, i0, end, c0, F, B, Z, acc, line):
        S, z = state
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        thread = ty * side + tx
        r, e = S.shape[2], S.shape[3]
        for f in range(0, r, depth):
            cuda.syncthreads()
            load(rows, h, i0, end, f, base, s, False, thread, F)
            for k in range(thread, depth * columns, threads):
                j = k // columns
                c = k - j * columns
                B[j, c] = S[h, s, f + j, c0 + c] if f + j < r and c0 + c < e else zero
            for k in range(thread, depth, threads):
                Z[k] = z[h, s, f + k] if f + k < r else zero
            cuda.syncthreads()
            for j in range(depth):
                for a in range(M):
                    for b in range(N):
                        acc[a, b] += F[ty + side * a, j] * B[j, tx + side * b]
            if quotient:
                for j in range(tx, depth, side):
                    for a in range(M):
                        line[a] += F[ty + side * a, j] * Z[j]

    return add_state


@functools.cache
def make_read(kind, of, query, causal, quotient, sizes):
    """y = phi S, or (phi S) / (phi z), for every row; causal with the pairs inside its span, rows
    being queries that see the keys before them, or keys that are seen by the queries after them.

    Launch: one block of (side, side) threads for each (head, span, tile of rows, tile of columns);
    a thread owns rows ty, ty + side, ... and columns tx, tx + side, ... of its tile of y.
    ``base`` and ``tops`` (H, spans, r) are the shifts of S and inside the span, ``careful``
    (H, spans) says where exponents are too far apart for a shift.
    """
    tile, depth, columns, side, _ = sizes
    M, N, threads, T, zero = tile // side, columns // side, side * side, real(kind), kind(0)
    load_values = make_load_values(kind, not query, depth, columns, threads)
    add_state = make_add_state(kind, of, query, quotient, sizes)
    weigh, multiply = make_weights(kind, of, query, sizes), make_multiply(kind, query, sizes)
    hidden, by_pairs = make_hidden(query), of == TRIG
    square, padded = tile + 1, depth + 1  # so that rows start in different banks

    @cuda.jit
    def read(rows, others, state, base, tops, careful, span, y, den):
        A = cuda.shared.array((tile, square), T)
        F = cuda.shared.array((tile, padded), T)
        G = cuda.shared.array((tile, padded), T)
        B = cuda.shared.array((depth, columns), T)
        Z = cuda.shared.array(depth, T)
        acc = cuda.local.array((M, N), T)
        line = cuda.local.array(M, T)
        w = cuda.local.array((M, M), T)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        thread = ty * side + tx
        n, spans, e = rows[0].shape[1], state[0].shape[1], state[0].shape[3]
        tiles = (span + tile - 1) // tile
        cuts = (e + columns - 1) // columns
        t = cuda.blockIdx.x // cuts
        c0 = (cuda.blockIdx.x - t * cuts) * columns
        h, s = t // tiles // spans, t // tiles % spans
        start = s * span
        i0, end = start + (t % tiles) * tile, min(start + span, n)
        if i0 >= end:
            return
        for a in range(M):
            line[a] = zero
            for b in range(N):
                acc[a, b] = zero
        add_state(rows, state, base, h, s, i0, end, c0, F, B, Z, acc, line)
        if causal:
            raw = by_pairs or (of == POSITIVE and careful[h, s] != 0)
            low, high = (start, i0 + 1) if query else (i0, end)
            for j0 in range(low, high, tile):
                weigh(rows, others, h, i0, j0, end, tops, s, raw, F, G, w)
                for a in range(M):
                    for b in range(M):
                        A[ty + side * a, tx + side * b] = w[a, b]
                        line[a] += w[a, b]
                for k in range(0, tile, depth):
                    cuda.syncthreads()
                    load_values(others, h, j0 + k, end, c0, thread, B)
                    cuda.syncthreads()
                    multiply(A, B, i0, j0, k, acc)
        if quotient:
            cuda.syncthreads()
            for a in range(M):
                A[ty + side * a, tx] = line[a]
            cuda.syncthreads()
        for a in range(M):
            i, total = i0 + ty + side * a, zero
            if quotient:
                for k in range(side):
                    total += A[ty + side * a, k]
            if i < end:
                for b in range(N):
                    c = c0 + tx + side * b
                    if c < e:
                        found = acc[a, b]
                        if quotient:
                            found = found / total if total != zero else zero
                        y[h, i, c] = zero if hidden(rows, h, i) else found
                if quotient and c0 == 0 and tx == 0:
                    den[h, i] = total

    return read
