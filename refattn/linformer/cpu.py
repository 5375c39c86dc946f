"""Linformer on the CPU: two products, and softmax attention on what they leave of the keys."""

import numpy as np

from refattn import checks
from refattn.dispatch import composed
from refattn.kernels import compiled, heads_of, in_parallel, running
from refattn.linformer import formula
from refattn.softmax.cpu import softmax_attention

# Rows of a piece of work. A head is cut at the same places however many heads there are: BLAS may
# add in another order for another number of rows, and a head's bits should not hang on the others.
ROWS = 128

linformer_attention_vjp = composed(formula.linformer_attention_vjp, "numba")


def linformer_attention(q, k, v, *, E, F=None, key_mask=None, scale=None):
    """``refattn.linformer_attention``: the products by the threads that attend afterwards."""
    q, k, v, dtype = checks.qkv(q, k, v)
    k, v, E, F, _ = formula.prepared(q, k, v, dtype, E, F, key_mask)
    y = softmax_attention(q, product(E, k), product(F, v), scale=scale)
    return y.astype(dtype, copy=False)


def product(a, b):
    """a (..., r, m) times b (..., m, c).

    NumPy's product leaves the threads of its BLAS spinning for a while, and what comes next would
    have to share the cores with them.
    """
    flat, heads, lead = heads_of(a, b)
    H, (r, m), c = len(heads), a.shape[-2:], b.shape[-1]
    if 0 in (H, r, m, c):
        return a @ b
    y = np.empty((H, r, c), a.dtype)
    cuts = np.append(np.arange(0, r, ROWS), r)
    with running():
        in_parallel(_products, H * (len(cuts) - 1), *flat, heads, cuts, y)
    return y.reshape(*lead, r, c)


@compiled
def _products(first, last, a, b, heads, cuts, y):
    parts = len(cuts) - 1
    for task in range(first, last):
        h, part = task // parts, task % parts
        r0, r1 = cuts[part], cuts[part + 1]
        np.dot(a[heads[h, 0], r0:r1], b[heads[h, 1]], y[h, r0:r1])
