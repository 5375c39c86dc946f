"""Performer's features of a block of rows, compiled: random features with their exponents shifted.

Feature r of a key is exp(b_jr) with b_jr = omega_r x_j - |x_j|^2 / 2, or sin(t_jr) exp(|x_j|^2 / 2)
with t = omega_r x, a cosine being a sine a quarter turn on. Exponents are in units of log 2. Blocks
stay small, so that the features of all positions are never held at once.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from refattn.kernels import compiled
from refattn.linear.groups import WIDTH, add_product, group
from refattn.scalars import exp2

POSITIVE, TRIG = 0, 1
PI, PI32 = float(np.pi), float(np.float32(np.pi))
PI_REST, PI32_REST = 1.2246467991473532e-16, PI - PI32  # with them pi to twice the digits
# sin x = x + x^3 (S1 + S2 x^2 + ...) on [-pi/2, pi/2], to below 2e-18.
S1, S2, S3, S4, S5, S6, S7, S8, S9, S10 = (
    (-1) ** k / float(np.prod(np.arange(1.0, 2 * k + 2))) for k in range(1, 11)
)


class Exponentials(NamedTuple):
    """A map to random features as the kernels take it."""

    kind: int
    r: int
    W: np.ndarray  # (r, d) directions, so that t = x W^T
    columns: np.ndarray  # W^T by groups of columns
    half: float  # of |x|^2 in a key's exponent
    inner: float  # dx = inner (dphi phi) W + outer sum(dphi phi) x
    outer: float


# Without "reassoc": the two parts of pi would be made one again.
@njit(fastmath={"contract", "nsz"})
def sine(t, turn):
    """sin(t + turn pi), by the nearest multiple of pi: a polynomial, so that loops vectorise."""
    kind = type(t)
    double = kind(1) + kind(1e-10) > kind(1)
    pi, rest = (kind(PI), kind(PI_REST)) if double else (kind(PI32), kind(PI32_REST))
    n = np.floor(t * kind(1 / PI) + turn + kind(0.5))
    f = (t - (n - turn) * pi) - (n - turn) * rest
    g = f * f
    p = ((((kind(S10) * g + kind(S9)) * g + kind(S8)) * g + kind(S7)) * g + kind(S6)) * g
    p = ((((p + kind(S5)) * g + kind(S4)) * g + kind(S3)) * g + kind(S2)) * g + kind(S1)
    odd = n - kind(2) * np.floor(n * kind(0.5))
    return (f + f * g * p) * (kind(1) - kind(2) * odd)


@compiled
def turn_of(c, w, zero):
    """Of the w features in a group the first half are cosines."""
    return zero + type(zero)(0.5) if 2 * c < w else zero


@compiled
def key_exponentials(maps, x, seen, most, top, room):
    """The shifted features of as many first keys of x as can share a shift; how many they are.

    ``top`` (r) has the largest exponent so far of each feature, and gets the new one: the shift.
    A query of this block may see no more than the first of these keys; it keeps its precision, as
    long as that key's exponents, or those before it, are at most ``most`` below the shift.
    ``room.marks`` = (shrink, sums, ...): what older sums must be multiplied by, and the features'
    sums; the features are in ``room.phi_k``.
    """
    shrink, sums, low, high = room.marks
    phi, h, kind = room.phi_k, room.line, maps.kind
    none, count = x.dtype.type(-np.inf), x.shape[0]
    first = key_exponents(x, seen, maps, phi, h)
    raise_to(low, top, phi, h, kind, first, min(first + 1, count))
    raise_to(high, low, phi, h, kind, first, count)
    if apart(high, low, most):
        count = first
        raise_to(high, low, phi, h, kind, first, count)
        while not apart(high, low, most):  # until the key that comes out too high
            raise_to(high, high, phi, h, kind, count, count + 1)
            count += 1
        count -= 1
        raise_to(high, low, phi, h, kind, first, count)
    for c in range(maps.r):
        shrink[c] = exp2(top[c] - high[c]) if high[c] > none else x.dtype.type(1)
        top[c] = high[c]
    shift_keys(phi, h, kind, top, low, count)
    for r0 in range(0, maps.r, WIDTH):
        g = group(phi, maps.r, r0, count)
        np.dot(room.weights[:count], g, sums[r0 : r0 + g.shape[1]])  # the block's weights are 1
    return count


@compiled
def key_exponents(x, seen, maps, phi, h):
    """h = -|x|^2 / 2, or + for sines, and -inf for hidden keys; phi = t + h, or t for sines.

    Returns the first key that is not hidden.
    """
    first, d = x.shape[0], x.shape[1]
    none = x.dtype.type(-np.inf)
    for b in range(x.shape[0]):
        square = x.dtype.type(0)
        for c in range(d):
            square += x[b, c] * x[b, c]
        h[b] = maps.half * square
        if seen.size > 0 and not seen[b]:
            h[b] = none
        else:
            first = min(first, b)
    for r0 in range(0, maps.r, WIDTH):
        g = group(phi, maps.r, r0, x.shape[0])
        w = g.shape[1]
        np.dot(x, maps.columns[r0 * d : r0 * d + w * d].reshape((d, w)), g)
        for b in range(g.shape[0] if maps.kind == POSITIVE else 0):
            row, shift = g[b], h[b]
            for c in range(w):
                row[c] = row[c] + shift if shift > none else none
    return first


@compiled
def raise_to(high, low, phi, h, kind, first, last):
    """high = the maximum of low and of the exponents of these keys."""
    for c in range(high.shape[0]):
        high[c] = low[c]
    for r0 in range(0, high.shape[0], WIDTH):
        g = group(phi, high.shape[0], r0, last)
        for b in range(first, last):
            row = g[b]
            for c in range(g.shape[1]):
                high[r0 + c] = max(high[r0 + c], h[b] if kind == TRIG else row[c])


@compiled
def apart(high, low, most):
    """Whether some entries are more than ``most`` apart."""
    count = 0
    for c in range(high.shape[0]):
        count += high[c] - low[c] > most
    return count > 0


@compiled
def shift_keys(phi, h, kind, top, base, count):
    """From exponents or angles to features."""
    r, zero = top.shape[0], top.dtype.type(0)
    for c in range(r):
        base[c] = top[c] if top[c] > -np.inf else zero  # -inf: nothing has been seen
    for r0 in range(0, r, WIDTH):
        g = group(phi, r, r0, count)
        w = g.shape[1]
        shift = base[r0 : r0 + w]
        for b in range(count):
            row = g[b]
            if kind == TRIG:
                size = exp2(h[b] - shift[0])
                for c in range(w):
                    row[c] = sine(row[c], turn_of(c, w, zero)) * size
                for c in range(w if size == 0 else 0):
                    row[c] = zero  # a hidden key's NaN
            else:
                for c in range(w):
                    row[c] = exp2(row[c] - shift[c])


@compiled
def query_exponentials(maps, x, top, phi, room):
    """phi (r, rows) gets the features of queries: their exponents with the keys' shifts, less their
    own largest, which cancels in the quotient."""
    kind, r, d, rows = maps.kind, maps.r, x.shape[1], x.shape[0]
    zero, best = x.dtype.type(0), room.line[: x.shape[0]]
    for a in range(rows):
        best[a] = -np.inf
    for r0 in range(0, r, WIDTH):
        w = min(WIDTH, r - r0)
        # Both sides transposed: BLAS packs neither, and x need not be turned round.
        np.dot(maps.columns[r0 * d : r0 * d + w * d].reshape((d, w)).T, x.T, phi[r0 : r0 + w])
        for c in range(w):
            row, shift = phi[r0 + c], top[r0 + c]
            if kind == TRIG:
                turn = turn_of(c, w, zero)
                for a in range(rows):
                    row[a] = sine(row[a], turn)
            else:
                for a in range(rows):
                    row[a] += shift
                    best[a] = max(best[a], row[a])
    if kind == POSITIVE:
        for a in range(rows):
            best[a] = best[a] if best[a] > -np.inf else zero
        for c in range(r):
            row = phi[c]
            for a in range(rows):
                row[a] = exp2(row[a] - best[a])


@compiled
def query_exponentials_vjp(maps, dphi, phi, x, part, dx):
    """From dphi (r, rows), which is written to, to dx.

    d phi_r = phi_r omega_r dx for a positive feature. What a factor common to all features of a
    query does cancels in the quotient, and so does the gradient through |x|^2 / 2.
    """
    r, rows = phi.shape
    for r0 in range(0, r, WIDTH):
        w = min(WIDTH, r - r0)
        g, p = dphi[r0 : r0 + w], phi[r0 : r0 + w]
        half = w // 2 if maps.kind == TRIG else 0
        for c in range(half):  # d cos t = -sin t dt, d sin t = cos t dt
            for a in range(rows):
                g[c, a] *= -p[half + c, a]
                g[half + c, a] *= p[c, a]
        for c in range(2 * half, w):
            for a in range(rows):
                g[c, a] *= p[c, a] * maps.inner
        add_product(g.T, maps.W[r0 : r0 + w], part, dx, r0 > 0)


@compiled
def key_exponentials_vjp(maps, dphi, phi, x, part, dx):
    """From dphi, in groups like phi, to dx: d phi_r = phi_r (omega_r - x) dx for a positive
    feature, + x for sines. dphi is written to."""
    r, rows, d = maps.r, x.shape[0], x.shape[1]
    for b in range(rows):
        total = x.dtype.type(0)
        for r0 in range(0, r, WIDTH):
            g, p = group(dphi, r, r0, rows)[b], group(phi, r, r0, rows)[b]
            for c in range(g.shape[0]):
                total += g[c] * p[c]
        for c in range(d):
            dx[b, c] = maps.outer * total * x[b, c]
    for r0 in range(0, r, WIDTH):
        g, p = group(dphi, r, r0, rows), group(phi, r, r0, rows)
        w = g.shape[1]
        half = w // 2 if maps.kind == TRIG else 0
        for b in range(rows):
            row, factor = g[b], p[b]
            for c in range(half):
                row[c] *= -factor[half + c]
                row[half + c] *= factor[c]
            for c in range(2 * half, w):
                row[c] *= factor[c] * maps.inner
        add_product(g, maps.W[r0 : r0 + w], part, dx, True)
