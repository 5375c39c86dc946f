"""Block attention (12.3.3): attention inside blocks X_1 .. X_M, and six ways to fuse them.

Beside it stand ``merged.py``, the loop over blocks of keys that makes the fusion exact, and
``two_level.py``, blocks that see each other's summaries.
"""

import numpy as np

from refattn import checks, masks
from refattn.arrays import sum_to_shape
from refattn.cost import Cost, qkvy_bytes, softmax_flops, working_size
from refattn.dispatch import backends, rows_of
from refattn.hierarchy.merged import merged, merged_vjp, spans
from refattn.softmax.formula import softmax_attention, softmax_attention_vjp
from refattn.sparse.formula import (
    sparse_attention,
    sparse_attention_cost,
    sparse_attention_vjp,
)

FUSES = ("concat", "sum", "mean", "max", "weighted", "exact")


@backends
def block_attention(q, k, v, *, block, fuse="concat", weights=None, scale=None):
    r"""Attention inside each block of positions; six ways to put the parts together.

    .. math:: \mathrm{Attention}(X) = \sum_{i=1}^{M} w_i\, \mathrm{Attention}(X_i)

    With A_i = softmax_attention(q_i, k_i, v_i) for the i-th block of ``block`` positions:

    - "concat": the A_i one after the other; each token sees its own block.
    - "sum", "mean", "max", "weighted": row p is the sum over i (mean, elementwise maximum, sum with
      ``weights``) of row p of A_i. This is the chapter's formula as it stands.
    - "exact": all queries attend to each block of keys, and row by row the parts get the weights
      exp(lse_i - lse). This makes the formula equal to softmax attention over everything.

    Parameters
    ----------
    q : array (..., n, d)
    k : array (..., m, d)
    v : array (..., m, e)
        One dtype for the three; leading axes broadcast. All but "exact" need n = m.
    block : int >= 1
        Positions of a block. The last block may be shorter with "concat" and "exact"; the other
        four need n = M block.
    fuse : {"concat", "sum", "mean", "max", "weighted", "exact"}
    weights : real array (..., M), optional
        For "weighted" and for it alone; leading axes broadcast to those of q, k and v. Any real
        numbers: to learn a weighted average, hand in the softmax of free parameters,
        ``w = exp(t - t.max()); weights = w / w.sum()``.
    scale : float, optional
        1/sqrt(d) if None.
    backend : {"numpy", "numba", "cuda"}

    Returns
    -------
    y : array (..., n, e), or (..., block, e) for "sum", "mean", "max" and "weighted"
        Without any block, y = 0.

    Raises
    ------
    TypeError
        As ``softmax_attention``; a block that is no integer, weights that are not real.
    ValueError
        As ``softmax_attention``; block < 1, an unknown fuse, n != m or n no multiple of block where
        it must be, weights that are missing, not wanted or of another shape.
    BackendUnavailable
        The backend's code, library or driver is missing.

    Notes
    -----
    Cost: about 2 n block (d + e) FLOPs and workspace for block^2 scores, one block at a time.
    "exact" saves memory and no work: 2 n m (d + e) FLOPs, workspace for n block scores.

    Error: "concat" and "max" as ``softmax_attention`` with block in the place of m; call that B.
    "mean": B + (M + 2) eps max|v|; "sum" and "weighted": that times M or sum |w_i|. "exact":
    twice the bound of ``softmax_attention`` plus eps P (A + log m + 8) max|v| for P blocks of keys.
    Tested against 40 digits in tests/test_formulas.py and tests/test_hierarchy.py.
    Measured worst, on refattn.verify.certain.hard: 2.6e-13 max|v|
    (logits of 1e4, cancelling values).

    Where it fails: "sum", "mean", "max" and "weighted" add up unrelated tokens, the p-th of each
    block; "concat" never looks across a border. In "exact", a block whose scores are all -inf, by
    infinite keys, counts for nothing even where its values are NaN.

    References
    ----------
    Qiu et al. 2019 (blockwise self-attention), arXiv:1911.02972, for "concat"; Dao et al. 2022,
    arXiv:2205.14135, section 3.1, for "exact".

    Examples
    --------
    Equal scores give means; blocks of two give 1 and 6.5, whose row-wise sum is 7.5:

    >>> import numpy as np
    >>> zero, v = np.zeros((4, 1)), np.array([[0.0], [2.0], [4.0], [9.0]])
    >>> block_attention(zero, zero, v, block=2).T
    array([[1. , 1. , 6.5, 6.5]])
    >>> block_attention(zero, zero, v, block=2, fuse="sum").T
    array([[7.5, 7.5]])
    >>> block_attention(zero, zero, v, block=2, fuse="exact").T
    array([[3.75, 3.75, 3.75, 3.75]])
    """
    q, k, v, dtype = checks.qkv(q, k, v)
    block, weights = checked_options(q, k, v, dtype, block, fuse, weights)
    if fuse == "exact":
        return merged(q, k, v, block, scale)[0].astype(dtype, copy=False)
    lead, (n, e) = checks.lead(q, k, v), (q.shape[-2], v.shape[-1])
    parts = spans(n, block)
    y = np.zeros((*lead, n if fuse == "concat" else block, e), q.dtype)
    if fuse == "max" and parts:
        y[...] = -np.inf
    for i, rows in enumerate(parts):
        a = _inside(q, k, v, rows, scale)  # (..., block, e)
        if fuse == "concat":
            y[..., rows, :] = a
        elif fuse == "max":
            np.maximum(y, a, out=y)
        elif fuse == "weighted":
            y += weights[..., i, None, None] * a
        else:
            y += a
    if fuse == "mean" and parts:
        y /= len(parts)
    return y.astype(dtype, copy=False)


@backends
def block_attention_vjp(dy, q, k, v, *, block, fuse="concat", weights=None, scale=None):
    r"""Gradient of ``block_attention``: from dy to (dq, dk, dv), and dweights if given.

    Each part gets its gradient from ``softmax_attention_vjp``: block i the rows of dy ("concat"),
    dy ("sum"), dy / M ("mean"), w_i dy ("weighted"), or dy where A_i is the first of the maxima
    ("max", a subgradient). For "exact", with y the fused output and w_i = exp(lse_i - lse),

    .. math:: dA_i = w_i\, dY, \qquad dlse_i = w_i\, (dY \cdot (A_i - Y))

    For "weighted", dweights_i is the sum of dY * A_i over all entries.

    Parameters
    ----------
    dy : array of the shape of y
        Gradient of a scalar with respect to y.
    q, k, v, block, fuse, weights, scale, backend
        As in the forward.

    Returns
    -------
    tuple of arrays
        dq, dk, dv and, for "weighted", dweights: each in the shape of its input, in q's dtype.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As the forward; ValueError for a dy that has not the shape of y.

    Notes
    -----
    Parts are computed again, not kept, one block at a time; only "max" holds all of them, n e
    numbers, to see which is largest. "exact" never makes an n x m array.

    Examples
    --------
    Each value of a pair with equal scores has weight 1/2 in two rows:

    >>> import numpy as np
    >>> zero = np.zeros((4, 1))
    >>> dq, dk, dv = block_attention_vjp(np.ones((4, 1)), zero, zero, zero, block=2)
    >>> dv.T
    array([[1., 1., 1., 1.]])
    """
    q, k, v, dtype = checks.qkv(q, k, v)
    shape_w = np.shape(weights)
    block, weights = checked_options(q, k, v, dtype, block, fuse, weights)
    n, e = q.shape[-2], v.shape[-1]
    shape = (*checks.lead(q, k, v), n if fuse in ("concat", "exact") else block, e)
    dy = checks.cotangent("dy", dy, shape, dtype)
    if fuse == "exact":
        grads = merged_vjp(dy, q, k, v, block, scale)
        return tuple(g.astype(dtype, copy=False) for g in grads)
    parts = spans(n, block)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    dw = [np.zeros(shape_w, q.dtype)] if fuse == "weighted" else []
    first = _first_maximum(q, k, v, parts, scale) if fuse == "max" and parts else None
    for i, rows in enumerate(parts):
        da = dy  # (..., block, e)
        if fuse == "concat":
            da = dy[..., rows, :]
        elif fuse == "mean":
            da = dy / len(parts)
        elif fuse == "max":
            da = np.where(first == i, dy, 0)
        elif fuse == "weighted":
            # y = sum_i w_i a_i
            da = weights[..., i, None, None] * dy
            dw_i = (dy * _inside(q, k, v, rows, scale)).sum(axis=(-1, -2))  # (...)
            dw[0][..., i] = sum_to_shape(dw_i, shape_w[:-1])
        inputs = q[..., rows, :], k[..., rows, :], v[..., rows, :]
        dq[..., rows, :], dk[..., rows, :], dv[..., rows, :] = softmax_attention_vjp(
            da, *inputs, scale=scale
        )
    return tuple(g.astype(dtype, copy=False) for g in (dq, dk, dv, *dw))


def block_attention_cost(n, m, d, e, *, block, fuse="concat", weights=None, scale=None, itemsize=4):
    """Counted cost of ``block_attention`` for one head, by the rule of ``refattn.cost``.

    Parameters
    ----------
    n, m, d, e : int
        Queries, keys, columns of q and k, columns of v.
    block, fuse
        As in the forward.
    weights
        Accepted: it is ``fuse`` that says whether M weights are read. ``scale`` costs the same
        whatever it is.
    itemsize : int
        Bytes of one number.

    Returns
    -------
    Cost

    Notes
    -----
    "exact" is counted as one attention with log-sum-exp for each of the P blocks of keys, a softmax
    over the P log-sum-exps of each row, and a weighted sum of P rows.

    Examples
    --------
    Two blocks of two make 8 pairs:

    >>> block_attention_cost(4, 4, 1, 1, block=2).flops == 8 * (2 + 1 + 5 + 2)
    True
    """
    n, m, d, e = checks.sizes(n, m, d, e)
    block = _sizes(n, m, block, fuse)
    parts, working = -(-m // block), working_size(itemsize)
    out = n if fuse in ("concat", "exact") else block
    moved = itemsize * (n * d + m * d + m * e + out * e)
    if fuse == "exact":
        flops = softmax_flops(n * m, d, e) + n * parts * (2 + 5 + 2 * e)
        # scores and output of a part, its log-sum-exp, and that of the parts before
        return Cost(flops, moved, working * n * (min(block, m) + e + 2))
    pairs = n // block * block**2 + (n % block) ** 2
    per_number = {"concat": 0, "sum": 1, "mean": 1, "max": 1, "weighted": 2}[fuse]
    flops = softmax_flops(pairs, d, e) + per_number * n * e
    flops += block * e if fuse == "mean" and n else 0
    moved += itemsize * parts if fuse == "weighted" else 0
    return Cost(flops, moved, working * min(block, n) * (min(block, n) + e))


def _cost_of_rows(rows, n, m, d, e, *, block, fuse="concat", weights=None, **sizes):
    block = _sizes(n, m, block, fuse)
    if fuse == "exact":
        return block_attention_cost(len(rows), m, d, e, block=block, fuse=fuse, **sizes)
    if fuse != "concat":
        raise ValueError(f"fuse={fuse!r} is not computed row by row: use block_attention_cost")
    start = np.asarray(rows, int) // block * block
    pairs = int((np.minimum(n, start + block) - start).sum())
    itemsize = sizes.get("itemsize", 4)
    inner = sparse_attention_cost(len(rows), m, d, e, nnz=pairs, itemsize=itemsize)
    return Cost(inner.flops, qkvy_bytes(len(rows), m, d, e, itemsize), inner.workspace)


@rows_of(
    block_attention,
    cost=_cost_of_rows,
    by_position=lambda sizes: sizes.get("fuse", "concat") == "concat",
)
def some_rows(rows, n, m, *, block, fuse="concat", weights=None, scale=None):
    """A block-diagonal mask for "concat"; "exact" takes any queries; the others mix rows."""
    block = _sizes(n, m, block, fuse)
    _weights_fit(fuse, weights)
    if fuse == "exact":
        options = {"block": block, "fuse": fuse, "scale": scale}
        return block_attention, block_attention_vjp, options
    if fuse == "concat":
        mask = masks.block_diagonal(n, block)[rows]
        return sparse_attention, sparse_attention_vjp, {"mask": mask, "scale": scale}
    return None


def _inside(q, k, v, rows, scale):
    """A_i: attention among the positions of one block."""
    return softmax_attention(q[..., rows, :], k[..., rows, :], v[..., rows, :], scale=scale)


def _first_maximum(q, k, v, parts, scale):
    """Which block attains each entry of the maximum: the first of them, (..., block, e)."""
    return np.argmax([_inside(q, k, v, rows, scale) for rows in parts], axis=0)


def _sizes(n, m, block, fuse):
    """The checked block."""
    block = checks.whole("block", block, least=1)
    checks.choice("fuse", fuse, FUSES)
    if fuse != "exact" and n != m:
        raise ValueError(f"q has {n} rows, k has {m}: they must agree unless fuse='exact'")
    if fuse not in ("concat", "exact") and n % block:
        raise ValueError(f"n is {n} and block {block}; fuse={fuse!r} needs a multiple of block")
    return block


def _weights_fit(fuse, weights):
    """Weights come with "weighted", and with it alone."""
    if fuse == "weighted" and weights is None:
        raise ValueError("weights is None; fuse='weighted' needs one weight a block, (..., M)")
    if fuse != "weighted" and weights is not None:
        raise ValueError(f"weights came with fuse={fuse!r}; only fuse='weighted' takes them")


def checked_options(q, k, v, dtype, block, fuse, weights):
    """The checked block, and the weights in the dtype of the arithmetic."""
    n = q.shape[-2]
    block = _sizes(n, k.shape[-2], block, fuse)
    _weights_fit(fuse, weights)
    lead = checks.lead(q, k, v)
    if weights is None:
        return block, None
    weights = checks.real_option("weights", weights, dtype, q.dtype)
    if weights.ndim < 1 or weights.shape[-1] != n // block:
        raise ValueError(
            f"weights has shape {weights.shape}; expected (..., M) with M = {n // block} blocks"
        )
    checks.fits("weights", weights, (*lead, n // block))
    return block, weights
