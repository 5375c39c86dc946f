"""Local attention on the CPU as spans of keys, and attention by csr masks."""

import numpy as np

from refattn import checks, masks
from refattn.arrays import gradients
from refattn.dispatch import rows_of
from refattn.softmax.cpu import over_spans, over_spans_vjp, some_rows, some_rows_vjp
from refattn.sparse import formula
from refattn.sparse.csr_cpu import sparse_attention, sparse_attention_vjp

__all__ = [
    "local_attention",
    "local_attention_vjp",
    "sparse_attention",
    "sparse_attention_vjp",
]


def local_attention(q, k, v, *, window, causal=False, dilation=1, scale=None):
    """``refattn.local_attention``, each query over the span of its window."""
    q, k, v, dtype = checks.qkv(q, k, v)
    y = None
    for rows, keys, spans in _residues(q.shape[-2], k.shape[-2], window, causal, dilation):
        few = q[..., rows, :], k[..., keys, :], v[..., keys, :]
        part = over_spans(*few, spans, dtype=dtype, scale=scale)[0]
        if rows == keys == slice(None):
            return part.astype(dtype, copy=False)
        if y is None:
            y = np.zeros((*part.shape[:-2], q.shape[-2], v.shape[-1]), q.dtype)
        y[..., rows, :] = part
    return y.astype(dtype, copy=False)


def local_attention_vjp(dy, q, k, v, *, window, causal=False, dilation=1, scale=None):
    """``refattn.local_attention_vjp``, each query over the span of its window."""
    q, k, v, dtype = checks.qkv(q, k, v)
    lead = checks.lead(q, k, v)
    dy = checks.cotangent("dy", dy, (*lead, q.shape[-2], v.shape[-1]), dtype)
    found = None
    for rows, keys, spans in _residues(q.shape[-2], k.shape[-2], window, causal, dilation):
        few = dy[..., rows, :], q[..., rows, :], k[..., keys, :], v[..., keys, :]
        part = over_spans_vjp(*few, spans, dtype=dtype, scale=scale)
        if rows == keys == slice(None):
            found = part
            break
        if found is None:
            found = [np.zeros((*lead, *x.shape[-2:]), q.dtype) for x in (q, k, v)]
        for whole, at, g in zip(found, (rows, keys, keys), part, strict=True):
            whole[..., at, :] = g
    return gradients(found, (q.shape, k.shape, v.shape), dtype)


@rows_of(formula.local_attention, backend="numba")
def _some_windows(rows, n, m, *, window, causal=False, dilation=1, **options):
    """The spans of the rows that are left; a dilated window as a mask."""
    if masks.reach(n, m, window, causal, dilation)[2] > 1:
        mask = masks.local(n, window, m=m, causal=causal, dilation=dilation)[rows]
        return formula.sparse_attention, formula.sparse_attention_vjp, {**options, "mask": mask}
    (_, _, spans), *_ = _residues(n, m, window, causal, dilation)
    return some_rows, some_rows_vjp, {**options, "spans": spans[rows]}


def _residues(n, m, window, causal, dilation):
    """Queries, keys (slices) and spans of each residue modulo the dilation.

    A dilated window meets only keys of one residue, and among these it is undilated: query i,
    which stands at position i + (m - n), is number (i + (m - n) - residue) / dilation of its own.
    """
    left, right, dilation = masks.reach(n, m, window, causal, dilation)
    for residue in range(dilation):
        start = (residue - (m - n)) % dilation
        count = max(0, -(-(m - residue) // dilation))
        i = np.arange(start, n, dilation, dtype=np.int32)
        i += m - n - residue
        i //= dilation
        spans = np.stack([i - min(left, n + m), i + (min(right, n + m) + 1)], axis=-1)
        np.clip(spans, 0, count, out=spans)
        spans[:, 0] = spans.min(axis=1)
        whole = dilation == 1
        rows = slice(None) if whole else slice(start, None, dilation)
        yield rows, slice(None) if whole else slice(residue, None, dilation), spans
