"""Sparse attention on a GPU: local windows by ``cuda_local``, csr masks by ``cuda_csr``."""

import numpy as np

from refattn import checks, gpu
from refattn.sparse.cuda_csr import BATCH, MOST, make_forward
from refattn.sparse.cuda_csr_backward import make_by_columns, make_by_rows
from refattn.sparse.cuda_local import local_attention, local_attention_vjp

__all__ = [
    "local_attention",
    "local_attention_vjp",
    "sparse_attention",
    "sparse_attention_vjp",
]


def sparse_attention(q, k, v, *, mask, scale=None):
    """``refattn.sparse_attention``, a block of threads for each row of the mask."""
    xp, q, k, v, dtype = gpu.qkv(q, k, v)
    mask = checks.csr_mask(mask, q.shape[-2], k.shape[-2])
    scale = checks.scale(scale, q.shape[-1])
    flat, heads, lead = gpu.heads_of(xp, q, k, v)
    y, _ = _forward(xp, flat, heads, mask, scale)
    return gpu.cast(xp, xp.reshape(y, (*lead, *y.shape[1:])), dtype)


def sparse_attention_vjp(dy, q, k, v, *, mask, scale=None):
    """``refattn.sparse_attention_vjp``, dq by rows of the mask, dk and dv by its columns."""
    xp, q, k, v, dtype = gpu.qkv(q, k, v)
    lead = checks.lead(q, k, v)
    rows = (*lead, q.shape[-2], v.shape[-1])
    dy = gpu.cotangent(xp, q, "dy", dy, rows, dtype)
    mask = checks.csr_mask(mask, q.shape[-2], k.shape[-2])
    scale = checks.scale(scale, q.shape[-1])
    flat, heads, _ = gpu.heads_of(xp, q, k, v)
    dy = gpu.contiguous(xp, xp.reshape(dy, (len(heads), *rows[-2:])))
    found = _backward(xp, dy, flat, heads, mask, scale)
    whole = (xp.reshape(g, (*lead, *g.shape[1:])) for g in found)
    pairs = zip(whole, (q, k, v), strict=True)
    return tuple(gpu.cast(xp, gpu.summed(xp, g, x.shape), dtype) for g, x in pairs)


def _forward(xp, flat, heads, mask, scale):
    """y (H, n, e) and lse (H, n)."""
    q, _, v = flat
    H, n, e, kind = len(heads), q.shape[1], v.shape[2], gpu.dtype_of(q).type
    none = not (mask.nnz and H and e)
    y = gpu.empty(xp, q, (H, n, e), kind, fill=0 if none else None)
    lse = gpu.empty(xp, q, (H, n), kind, fill=-np.inf if none else None)
    if not none:
        columns, slices = _cut(e)
        given = *flat, heads, *_pairs(mask), kind(scale)
        gpu.launch(make_forward(columns, kind), (H * n, slices), BATCH, given, (y, lse))
    return y, lse


def _backward(xp, dy, flat, heads, mask, scale):
    """dq, dk and dv of each head, (H, ., .)."""
    q, k, v = flat
    H, (n, m), d, e = len(heads), mask.shape, q.shape[2], v.shape[2]
    kind = gpu.dtype_of(q).type
    none = not (mask.nnz and H and e)
    shapes = (H, n, d), (H, m, d), (H, m, e)
    dq, dk, dv = (gpu.empty(xp, q, shape, kind, fill=0 if none else None) for shape in shapes)
    if none:
        return dq, dk, dv
    y, lse = _forward(xp, flat, heads, mask, scale)
    delta = gpu.empty(xp, q, (H, n), kind)
    columns, slices = _cut(d)
    given = dy, *flat, heads, *_pairs(mask), kind(scale), y, lse
    gpu.launch(make_by_rows(columns, kind), (H * n, slices), BATCH, given, (dq, delta))
    columns, slices = _cut(max(d, e))
    given = dy, *flat, heads, *_pairs(mask.T.tocsr()), kind(scale), lse, delta
    gpu.launch(make_by_columns(columns, kind), (H * m, slices), BATCH, given, (dk, dv))
    return dq, dk, dv


def _cut(width):
    """Columns a thread, a power of two so that kernels are few; and slices of a row."""
    columns = min(MOST, 1 << ((width - 1) // BATCH).bit_length())
    return columns, -(-width // (columns * BATCH))


def _pairs(mask):
    """indptr and indices as kernels take them."""
    return mask.indptr.astype(np.int64), mask.indices.astype(np.int32)
