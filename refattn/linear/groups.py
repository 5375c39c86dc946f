"""Blocks of features in memory, and their products, compiled.

Features of a block of keys are held by groups of columns, (rows, at most WIDTH) one after another;
those of queries transposed, (r, rows). So the largest over features, and every sum over keys or
features, is an update of whole rows, and each product of matrices is small enough for the kernels
of BLAS that do not pack their factors first: a quarter faster at 64 columns.
"""

import numpy as np

from refattn.kernels import compiled

WIDTH = 128


@compiled
def group(flat, r, r0, rows):
    """Features r0 .. r0 + WIDTH of the first rows of a block of keys, as a matrix."""
    room, w = flat.shape[0] // r, min(WIDTH, r - r0)
    return flat[r0 * room : r0 * room + rows * w].reshape((rows, w))


@compiled
def add_product(a, b, part, out, add):
    """out += a b, or out = a b."""
    if not add:
        np.dot(a, b, out)
        return
    product = part[: out.size].reshape(out.shape)
    np.dot(a, b, product)
    for i in range(out.shape[0]):
        row, into = product[i], out[i]
        for c in range(out.shape[1]):
            into[c] += row[c]


@compiled
def put(x, out):
    """out[:] = x, which Numba compiles into eight times the code."""
    for c in range(x.shape[0]):
        out[c] = x[c]


@compiled
def fill(out, value):
    for c in range(out.shape[0]):
        out[c] = value
