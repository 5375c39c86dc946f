"""Performer's random features as CUDA kernels: their exponents and sines, and back to rows.

With directions W = sqrt(scale) omega (M, d) and t = x W^T, what attention is given is

    positive     t - scale |x|^2 / 2 of a key, an exponent;
    hyperbolic   that of t and of -t;
    trig         cos t and sin t, all with the exponent scale |x|^2 / 2 of their key.

A query's own |x|^2 / 2 cancels in the quotient and is left out.
"""

import functools
import math

import numpy as np

from refattn.gpu import cuda
from refattn.linear.cuda_maps import TRIG, real

PI, PI32 = float(np.pi), float(np.float32(np.pi))
PI_REST, PI32_REST = 1.2246467991473532e-16, PI - PI32  # with them pi to twice the digits
# sin x = x + x^3 (s1 + s2 x^2 + ...) on [-pi/2, pi/2], to below 2e-18.
SERIES = [(-1) ** k / float(np.prod(np.arange(1.0, 2 * k + 2))) for k in range(1, 11)]


def make_sine(kind):
    """``sine(t, turn)``: sin(t + turn pi), by the nearest multiple of pi. The library's own sine
    keeps a table in memory for large numbers."""
    zero, half, two, one = kind(0), kind(0.5), kind(2), kind(1)
    single = kind is np.float32
    pi, rest = (kind(PI32), kind(PI32_REST)) if single else (kind(PI), kind(PI_REST))
    over = kind(1 / PI)
    s1, s2, s3, s4, s5, s6, s7, s8, s9, s10 = (kind(s) for s in SERIES)

    @cuda.jit(device=True)
    def sine(t, turn):
        if t - t != zero:  # NaN, and of an infinite number too
            return t - t
        n = kind(math.floor(t * over + turn + half))
        f = (t - (n - turn) * pi) - (n - turn) * rest
        g = f * f
        p = ((((s10 * g + s9) * g + s8) * g + s7) * g + s6) * g
        p = ((((p + s5) * g + s4) * g + s3) * g + s2) * g + s1
        odd = n - two * kind(math.floor(n * half))
        return (f + f * g * p) * (one - two * odd)

    return sine


@functools.cache
def make_exponents(kind, of, two, sizes):
    """Exponents or sines (., n, r), and, for trig, the exponent of each row (., n).

    ``half`` times |x|^2 is added to the exponents, or is a row's. ``two`` features a direction.

    Launch: one block of (side, side) threads for each (head, tile of rows, tile of directions); a
    thread owns rows ty, ty + side, ... and directions tx, tx + side, ... of its tile.
    """
    tile, depth, columns, side, _ = sizes
    M, N, threads, T, zero = tile // side, columns // side, side * side, real(kind), kind(0)
    sine, quarter, padded = make_sine(kind), kind(0.5), depth + 1  # rows in different banks

    @cuda.jit
    def exponents(x, W, half, out, line):
        X = cuda.shared.array((tile, padded), T)
        D = cuda.shared.array((columns, padded), T)
        Q = cuda.shared.array((tile, side), T)
        acc = cuda.local.array((M, N), T)
        square = cuda.local.array(M, T)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        thread = ty * side + tx
        n, d, count = x.shape[1], x.shape[2], W.shape[0]
        tiles, cuts = (n + tile - 1) // tile, (count + columns - 1) // columns
        t = cuda.blockIdx.x // cuts
        f0 = (cuda.blockIdx.x - t * cuts) * columns
        h = t // tiles
        i0 = (t - h * tiles) * tile
        for a in range(M):
            square[a] = zero
            for b in range(N):
                acc[a, b] = zero
        for c0 in range(0, d, depth):
            cuda.syncthreads()
            for k in range(thread, tile * depth, threads):
                a = k // depth
                c = k - a * depth
                X[a, c] = x[h, i0 + a, c0 + c] if i0 + a < n and c0 + c < d else zero
            for k in range(thread, columns * depth, threads):
                a = k // depth
                c = k - a * depth
                D[a, c] = W[f0 + a, c0 + c] if f0 + a < count and c0 + c < d else zero
            cuda.syncthreads()
            for c in range(depth):
                for a in range(M):
                    for b in range(N):
                        acc[a, b] += X[ty + side * a, c] * D[tx + side * b, c]
            for c in range(tx, depth, side):
                for a in range(M):
                    square[a] += X[ty + side * a, c] * X[ty + side * a, c]
        for a in range(M):
            Q[ty + side * a, tx] = square[a]
        cuda.syncthreads()
        for a in range(M):
            i, total = i0 + ty + side * a, zero
            for k in range(side):
                total += Q[ty + side * a, k]
            total *= half
            for b in range(N):
                f, t = f0 + tx + side * b, acc[a, b]
                if i < n and f < count:
                    if of == TRIG:
                        out[h, i, f] = sine(t, quarter)
                        out[h, i, f + count] = sine(t, zero)
                    else:
                        out[h, i, f] = t + total
                        if two:
                            out[h, i, f + count] = total - t
            if of == TRIG and f0 == 0 and tx == 0 and i < n:
                line[h, i] = total

    return exponents


@functools.cache
def make_rows_vjp(kind, of, two, sizes):
    """dx (., n, d) from the gradient g of exponents or sines (., n, r): that of t times W, and
    ``outer`` times x for each row's exponent.

    ``made`` (., n, r) is what ``make_exponents`` gave: d cos t = -sin t dt, d sin t = cos t dt. Of
    a hidden row g is 0, while the rest may be NaN.

    Launch: one block of (side, side) threads for each (head, tile of rows, tile of columns of x).
    """
    tile, depth, columns, side, _ = sizes
    M, N, threads, T, zero = tile // side, columns // side, side * side, real(kind), kind(0)
    padded = depth + 1  # so that rows start in different banks

    @cuda.jit
    def rows_vjp(g, made, x, W, outer, dx):
        U = cuda.shared.array((tile, padded), T)
        R = cuda.shared.array((tile, padded), T)
        D = cuda.shared.array((depth, columns), T)
        Q = cuda.shared.array((tile, side), T)
        acc = cuda.local.array((M, N), T)
        own = cuda.local.array(M, T)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        thread = ty * side + tx
        n, d, count = x.shape[1], x.shape[2], W.shape[0]
        tiles, cuts = (n + tile - 1) // tile, (d + columns - 1) // columns
        t = cuda.blockIdx.x // cuts
        c0 = (cuda.blockIdx.x - t * cuts) * columns
        h = t // tiles
        i0 = (t - h * tiles) * tile
        for a in range(M):
            own[a] = zero
            for b in range(N):
                acc[a, b] = zero
        for f0 in range(0, count, depth):
            cuda.syncthreads()
            for k in range(thread, tile * depth, threads):
                a = k // depth
                c = k - a * depth
                i, f = i0 + a, f0 + c
                turn, total = zero, zero
                if i < n and f < count:
                    turn = g[h, i, f]
                    total = turn
                    if of == TRIG and (turn != zero or g[h, i, f + count] != zero):
                        sin, cos, other = made[h, i, f + count], made[h, i, f], g[h, i, f + count]
                        total = turn * cos + other * sin
                        turn = other * cos - turn * sin
                    elif of != TRIG and two:
                        total = turn + g[h, i, f + count]
                        turn -= g[h, i, f + count]
                U[a, c] = turn
                R[a, c] = total
            for k in range(thread, depth * columns, threads):
                a = k // columns
                c = k - a * columns
                D[a, c] = W[f0 + a, c0 + c] if f0 + a < count and c0 + c < d else zero
            cuda.syncthreads()
            for k in range(depth):
                for a in range(M):
                    for b in range(N):
                        acc[a, b] += U[ty + side * a, k] * D[k, tx + side * b]
            for k in range(tx, depth, side):
                for a in range(M):
                    own[a] += R[ty + side * a, k]
        for a in range(M):
            Q[ty + side * a, tx] = own[a]
        cuda.syncthreads()
        for a in range(M):
            i, total = i0 + ty + side * a, zero
            for k in range(side):
                total += Q[ty + side * a, k]
            for b in range(N):
                c = c0 + tx + side * b
                if i < n and c < d:
                    found = acc[a, b]
                    if outer != zero and total != zero:  # 0 of a hidden row, x NaN
                        found += outer * total * x[h, i, c]
                    dx[h, i, c] = found

    return rows_vjp
