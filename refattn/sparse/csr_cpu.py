"""Attention by csr masks on the CPU: arguments as in ``formula``, tiles by ``tiles``."""

import itertools

import numpy as np

from refattn import checks
from refattn.arrays import gradients
from refattn.kernels import all_finite, heads_of, in_parallel, joined, ready, running
from refattn.scalars import LOG2E
from refattn.sparse import formula
from refattn.sparse.plan import LEAST, WIDE, plan_of
from refattn.sparse.tiles import attend
from refattn.sparse.tiles_backward import attend_vjp

PARTS = 8  # of the queries of all heads together in a backward pass, so that cores find work
PAIRS = 2**22  # pairs of all heads together that the formula is given at a time

# The formulas themselves: inside another formula, the public names may lead back to this module.
by_formula = formula.sparse_attention.__wrapped__
vjp_by_formula = formula.sparse_attention_vjp.__wrapped__


def sparse_attention(q, k, v, *, mask, scale=None):
    """``refattn.sparse_attention``, tile by tile: scores live no longer than their tile."""
    q, k, v, dtype = checks.qkv(q, k, v)
    mask = checks.csr_mask(mask, q.shape[-2], k.shape[-2])
    scale = checks.scale(scale, q.shape[-1])
    flat, heads, lead = heads_of(q, k, v)
    y = np.zeros((len(heads), q.shape[-2], v.shape[-1]), q.dtype)
    finite = np.ones((1, 1), bool)
    if mask.nnz and y.size:
        with running():
            y, _, finite = _forward(flat, heads, plan_of(mask), scale)
    y = y.reshape(*lead, *y.shape[1:])
    for t in np.flatnonzero(~finite.all(axis=0)):  # a NaN, perhaps out of sight: 0 times NaN is NaN
        rows = slice(t * WIDE, (t + 1) * WIDE)
        y[..., rows, :] = by_formula(q[..., rows, :], k, v, mask=mask[rows], scale=scale)
    return y.astype(dtype, copy=False)


def sparse_attention_vjp(dy, q, k, v, *, mask, scale=None):
    """``refattn.sparse_attention_vjp``, the weights computed again tile by tile."""
    q, k, v, dtype = checks.qkv(q, k, v)
    mask = checks.csr_mask(mask, q.shape[-2], k.shape[-2])
    rows = (*checks.lead(q, k, v), q.shape[-2], v.shape[-1])
    dy = checks.cotangent("dy", dy, rows, dtype)
    scale = checks.scale(scale, q.shape[-1])
    flat, heads, lead = heads_of(q, k, v)
    found = [np.zeros((len(heads), *x.shape[-2:]), q.dtype) for x in (q, k, v)]
    if mask.nnz and dy.size:
        found = _backward(ready(dy).reshape(-1, *rows[-2:]), flat, heads, mask, scale)
    found = [g.reshape(*lead, *g.shape[1:]) for g in found]
    if not all_finite(*found):
        found = _backward_by_formula(dy, q, k, v, mask, scale)
    return gradients(found, (q.shape, k.shape, v.shape), dtype)


def _forward(flat, heads, plan, scale):
    """y (H, n, e), lse (H, n), and whether each tile came out finite, (H, tiles)."""
    q, _, v = flat
    y = np.empty((len(heads), q.shape[1], v.shape[2]), q.dtype)
    lse = np.empty(y.shape[:2], q.dtype)
    finite = np.ones((len(heads), len(plan.dense)), np.bool_)
    order = np.argsort(-_weights(plan), kind="stable")  # the heaviest first: what is left is light
    rest = heads, plan, order, q.dtype.type(scale * LOG2E), (y, lse, finite)
    in_parallel(attend, finite.size, *flat, *rest)
    return y, lse, finite


def _backward(dy, flat, heads, mask, scale):
    """[dq, dk, dv] of each head, (H, ., .)."""
    q, k, v = flat
    H, (n, m), d, e = len(heads), mask.shape, k.shape[2], v.shape[2]
    with running():
        plan = plan_of(mask)
        y, lse, _ = _forward(flat, heads, plan, scale)
        with np.errstate(over="ignore", invalid="ignore"):
            delta = np.vecdot(dy, y)
        parts = _parts(plan, mask, H)
        rows = int((parts[:, 3] - parts[:, 2]).sum())
        dq, dk, dv = (np.zeros((H, *s), q.dtype) for s in ((n, d), (rows, d), (rows, e)))
        numbers = np.array([scale, scale * LOG2E], q.dtype)
        rest = heads, plan, parts, numbers, (lse, delta), (dq, dk, dv)
        in_parallel(attend_vjp, H * len(parts), dy, *flat, *rest)
    return [dq, joined(dk, parts, m), joined(dv, parts, m)]


def _weights(plan):
    """What each tile takes, counted in pairs that go one by one."""
    starts = np.arange(0, len(plan.left), WIDE)
    return LEAST * plan.dense + np.add.reduceat(plan.left, starts) + WIDE


def _parts(plan, mask, H):
    """(parts, 5) for ``attend_vjp``: tiles, the keys that they see, and their place in dk and dv.

    A part is first, last + 1, least key, largest key + 1, place. Only where heads are few are
    there several, and then memory for the keys of each.
    """
    done = np.cumsum(_weights(plan))
    count = max(1, PARTS // H)
    if count == 1:
        return np.array([[0, len(done), 0, mask.shape[1], 0]])
    edges = np.searchsorted(done, done[-1] * np.arange(1, count) // count)
    edges = np.unique([0, *edges, len(done)])
    parts, place = [], 0
    for first, last in itertools.pairwise(edges):
        seen = mask.indices[plan.indptr[first * WIDE] : plan.indptr[: last * WIDE + 1][-1]]
        low, high = (seen.min(), seen.max() + 1) if len(seen) else (0, 0)
        parts.append((first, last, low, high, place))
        place += high - low
    return np.array(parts, np.int64)


def _backward_by_formula(dy, q, k, v, mask, scale):
    """[dq, dk, dv], some rows at a time: where NaN must not pass the mask."""
    lead = dy.shape[:-2]
    q, k, v = (np.broadcast_to(x, (*lead, *x.shape[-2:])) for x in (q, k, v))
    found = [np.zeros(x.shape, q.dtype) for x in (q, k, v)]
    size = max(1, PAIRS // int(np.prod(lead)))
    edges = np.searchsorted(mask.indptr, np.arange(size, mask.nnz, size))
    for first, last in itertools.pairwise(np.unique([0, *edges, mask.shape[0]])):
        rows = slice(first, last)
        few = dy[..., rows, :], q[..., rows, :], k, v
        part = vjp_by_formula(*few, mask=mask[rows], scale=scale)
        found[0][..., rows, :] = part[0]
        found[1] += part[1]
        found[2] += part[2]
    return found
