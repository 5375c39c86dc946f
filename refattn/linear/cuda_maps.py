"""Feature maps of one number, and tiles of features in shared memory, for the CUDA kernels.

A side of an attention, queries or keys, is a tuple of arrays

    x (., n, r)       what features are made of,
    line (., n)       an exponent of each row, where the map has exponents,
    values (., n, e)  v of keys; the gradient of the numerator of queries,
    weights (., n)    1, or 0 for a hidden key; the gradient of the denominator of queries,
    at (H, 4)         which of x, line, values and weights belongs to head h.

Exponential features are held under a shift ``top`` of each feature, which runs along with the keys:
that of a key is exp(b - top), that of a query exp(a + top - its largest), the last being ``line``.
"""

import math
from typing import NamedTuple

import numba
import numpy as np

from refattn.gpu import cuda

# Ready made; elu + 1; max(x, 0); exp of x; x exp(line), of sines and cosines.
READY, ELU, RELU, POSITIVE, TRIG = range(5)


class Sizes(NamedTuple):
    """How work is cut: a tile's rows, how many of them are multiplied at a time, a tile's columns,
    a block's threads on a side, and the positions of a causal form that share a state.

    ``side`` divides rows and columns, depth divides rows, rows divide a span and are at most
    side^2.
    """

    rows: int
    depth: int
    columns: int
    side: int
    span: int


# A state takes about the memory of its span's rows. Shared memory stays below 48 KiB.
SIZES = {np.float32: Sizes(64, 16, 64, 16, 128), np.float64: Sizes(32, 16, 32, 16, 128)}


def real(kind):
    """The type of Numba for shared and local arrays."""
    return numba.from_dtype(np.dtype(kind))


def make_feature(kind, of):
    """``feature(x, line, shift)``."""
    zero, one = kind(0), kind(1)
    if of == ELU:

        def feature(x, line, shift):
            return x + one if x > zero else math.exp(x)

    elif of == RELU:

        def feature(x, line, shift):
            return zero if x < zero else x  # NaN stays

    elif of == POSITIVE:

        def feature(x, line, shift):
            return math.exp((x + shift) + line)

    elif of == TRIG:

        def feature(x, line, shift):
            return x * math.exp(line + shift)

    else:

        def feature(x, line, shift):
            return x

    return cuda.jit(device=True)(feature)


def make_feature_vjp(kind, of):
    """``feature_vjp(g, x, line, shift)``: from the gradient of a feature to that of x."""
    zero = kind(0)
    if of == ELU:

        def feature_vjp(g, x, line, shift):
            return g if x > zero else g * math.exp(x)

    elif of == RELU:

        def feature_vjp(g, x, line, shift):
            return g if x > zero else zero

    elif of == POSITIVE:

        def feature_vjp(g, x, line, shift):
            return g * math.exp((x + shift) + line)

    elif of == TRIG:

        def feature_vjp(g, x, line, shift):
            return g * math.exp(line + shift)

    else:

        def feature_vjp(g, x, line, shift):
            return g

    return cuda.jit(device=True)(feature_vjp)


def make_line_of(kind, of, query):
    """``line_of(side, h, i)``: the exponent of a row."""
    zero, used = kind(0), of == TRIG or (of == POSITIVE and query)

    @cuda.jit(device=True)
    def line_of(side, h, i):
        return side[1][side[4][h, 1], i] if used else zero

    return line_of


def make_shift_of(kind, of, query):
    """``shift_of(shifts, h, s, f)``: what a feature's exponent gets for its shift."""
    zero, none, used = kind(0), kind(-np.inf), of >= POSITIVE

    @cuda.jit(device=True)
    def shift_of(shifts, h, s, f):
        if not used:
            return zero
        top = shifts[h, s, f]
        if query:
            return top
        return -top if top > none else zero  # -inf: no key has been seen

    return shift_of


def make_hidden(query):
    """``hidden(side, h, i)``: whether nobody may see row i. Queries are never hidden."""

    @cuda.jit(device=True)
    def hidden(side, h, i):
        return False if query else side[3][side[4][h, 3], i] == 0

    return hidden


def make_load(kind, of, query, rows, columns, threads):
    """``load(side, h, first, end, column, shifts, s, raw, thread, tile)``: the features from
    ``column`` on of the positions from ``first`` on, none from ``end`` on.

    ``raw``: the exponents of exponentials, the sines without theirs.
    """
    zero, none = kind(0), kind(-np.inf)
    feature, line_of = make_feature(kind, of), make_line_of(kind, of, query)
    shift_of, hidden = make_shift_of(kind, of, query), make_hidden(query)

    @cuda.jit(device=True)
    def load(side, h, first, end, column, shifts, s, raw, thread, tile):
        x, own = side[0], side[4][h, 0]
        for t in range(thread, rows * columns, threads):
            a = t // columns
            c = t - a * columns
            i, f = first + a, column + c
            found = none if of == POSITIVE and raw else zero
            if i < end and f < x.shape[2] and not hidden(side, h, i):
                found = x[own, i, f]
                if not raw:
                    found = feature(found, line_of(side, h, i), shift_of(shifts, h, s, f))
                elif of == POSITIVE:
                    found += line_of(side, h, i)
            tile[a, c] = found

    return load


def make_load_values(kind, query, rows, columns, threads):
    """``load_values(side, h, first, end, column, thread, tile)``: values, 0 for hidden rows."""
    zero, hidden = kind(0), make_hidden(query)

    @cuda.jit(device=True)
    def load_values(side, h, first, end, column, thread, tile):
        values, own = side[2], side[4][h, 2]
        for t in range(thread, rows * columns, threads):
            a = t // columns
            c = t - a * columns
            i, j = first + a, column + c
            found = zero
            if i < end and j < values.shape[2] and not hidden(side, h, i):
                found = values[own, i, j]
            tile[a, c] = found

    return load_values
