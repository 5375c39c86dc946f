"""Steps on the stored pairs of a csr mask: arrays (..., nnz), in the mask's order.

A pair meets only its own row and column, so a NaN elsewhere in k or v cannot leak in.
"""

import numpy as np
import scipy

PAIRS = 1024  # pairs whose dot products are computed together


def pair_dots(a, b, mask):
    """a_i . b_j for each stored pair, (..., nnz), in chunks so that no (nnz, d) array is made."""
    i, j = np.repeat(np.arange(mask.shape[0]), np.diff(mask.indptr)), mask.indices
    dots = np.empty_like(a, shape=(*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), len(i)))
    for start in range(0, len(i), PAIRS):
        part = slice(start, start + PAIRS)
        dots[..., part] = np.vecdot(a[..., i[part], :], b[..., j[part], :])
    return dots


def pair_weights(q, k, mask, scale):
    """Softmax over each row's stored pairs, (..., nnz)."""
    s = scale * pair_dots(q, k, mask)
    top = row_reduce(np.maximum, s, mask)
    p = np.exp(s - per_pair(np.where(top == -np.inf, 0, top), mask))
    l = row_reduce(np.add, p, mask)
    return p / per_pair(np.where(l == 0, 1, l), mask)


def row_reduce(operation, x, mask):
    """Reduce (..., nnz) over each row that has pairs: (..., such rows)."""
    starts = mask.indptr[:-1][np.diff(mask.indptr) > 0]
    return operation.reduceat(x, starts, axis=-1)


def per_pair(x, mask):
    """Hand each such row's number back to its pairs: the inverse shape of ``row_reduce``."""
    counts = np.diff(mask.indptr)
    return np.repeat(x, counts[counts > 0], axis=-1)


def csr_matmul(p, mask, b, *, transpose=False):
    """P @ b (or P.T @ b) with P holding p at the mask's pairs: a stored pair only meets its own."""
    lead = np.broadcast_shapes(p.shape[:-1], b.shape[:-2])
    p = np.broadcast_to(p, (*lead, p.shape[-1]))
    b = np.broadcast_to(b, (*lead, *b.shape[-2:]))
    y = np.empty((*lead, mask.shape[transpose], b.shape[-1]), b.dtype)
    for at in np.ndindex(lead):
        weights = scipy.sparse.csr_array((p[at], mask.indices, mask.indptr), shape=mask.shape)
        y[at] = (weights.T if transpose else weights) @ b[at]
    return y
