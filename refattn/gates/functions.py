"""Gate functions G (12.3.4): how much of each query's attention is kept, or none of it."""

import numpy as np
import scipy

from refattn import checks


def sigmoid(x, w, b):
    r"""A soft gate between 0 and 1.

    .. math:: G = \sigma(x w + b), \qquad \sigma(t) = 1 / (1 + e^{-t})

    Parameters
    ----------
    x : array (..., n, c)
        What the gate looks at: the queries, or the layer's input.
    w : array (c, g)
    b : array (g,)
        g is 1, one number a row, or e, one for each column of the values.

    Returns
    -------
    array (..., n, g)

    Raises
    ------
    TypeError, ValueError
        Not real floating point; shapes that do not fit.

    References
    ----------
    Qiu et al. 2025, arXiv:2505.06708 (gates after attention).

    Examples
    --------
    >>> sigmoid(np.zeros((2, 3)), np.ones((3, 1)), np.zeros(1)).T
    array([[0.5, 0.5]])
    """
    x, w, b, dtype = _sigmoid_inputs(x, w, b)
    return scipy.special.expit(x @ w + b).astype(dtype, copy=False)


def sigmoid_vjp(dg, x, w, b):
    r"""Gradient of ``sigmoid``: from dg (..., n, g) to (dx, dw, db).

    .. math:: dt = dg\, G (1 - G), \quad dx = dt\, w^T, \quad dw = \sum x^T dt, \quad db = \sum dt

    Parameters
    ----------
    dg : array (..., n, g)
    x, w, b
        As in ``sigmoid``.

    Returns
    -------
    (dx, dw, db) : arrays in the shapes of x, w and b

    Raises
    ------
    TypeError, ValueError
        As ``sigmoid``; ValueError for a dg that has not the gate's shape.

    Examples
    --------
    >>> dx, dw, db = sigmoid_vjp(np.ones((1, 1)), np.ones((1, 1)), np.zeros((1, 1)), np.zeros(1))
    >>> float(dw[0, 0]), float(db[0])
    (0.25, 0.25)
    """
    x, w, b, dtype = _sigmoid_inputs(x, w, b)
    dg = checks.cotangent("dg", dg, (*x.shape[:-1], w.shape[1]), dtype)
    g = scipy.special.expit(x @ w + b)
    # g = sigmoid(t), t = x @ w + b
    dt = dg * g * (1 - g)
    rows = int(np.prod(x.shape[:-1]))
    x, flat = x.reshape(rows, x.shape[-1]), dt.reshape(rows, w.shape[1])
    grads = dt @ w.T, x.T @ flat, flat.sum(axis=0)
    return tuple(grad.astype(dtype, copy=False) for grad in grads)


def threshold(scores, at):
    """A hard gate: 1 where the score is at least ``at``, else 0.

    Parameters
    ----------
    scores : array (..., n)
    at : float

    Returns
    -------
    array (..., n, 1) of zeros and ones
        It is a constant: no gradient reaches the scores.

    Raises
    ------
    TypeError, ValueError
        Scores that are not real floating point, or have no axis.

    Examples
    --------
    >>> threshold(np.array([0.2, 0.7, 0.5]), 0.5).T
    array([[0., 1., 1.]])
    """
    scores = _scores(scores)
    wide = scores.astype(checks.compute_dtype(scores.dtype), copy=False)
    return (wide >= checks.number("at", at)).astype(scores.dtype)[..., None]


def top_k(scores, k):
    """A hard gate that keeps exactly k rows: the largest scores, ties to the lower index.

    Parameters
    ----------
    scores : array (..., n)
    k : int from 0 to n

    Returns
    -------
    array (..., n, 1) of zeros and ones
        It is a constant: no gradient reaches the scores.

    Raises
    ------
    TypeError, ValueError
        Scores that are not real floating point; k > n.

    References
    ----------
    Raposo et al. 2024 (mixture of depths), arXiv:2404.02258.

    Examples
    --------
    >>> top_k(np.array([1.0, 3.0, 3.0, 3.0]), 2).T
    array([[0., 1., 1., 0.]])
    """
    scores = _scores(scores)
    k = checks.whole("k", k, least=0, most=scores.shape[-1])
    return _largest(scores, k).astype(scores.dtype)[..., None]


def block_top_k(q, k, *, block, top):
    r"""For each query, the ``top`` blocks of keys whose mean key it likes best, as masks.

    .. math:: score_{ib} = q_i \cdot \frac{1}{|B_b|} \sum_{j \in B_b} k_j

    Parameters
    ----------
    q : array (..., n, d)
    k : array (..., m, d)
    block : int >= 1
        Keys in a block; the last may be short.
    top : int
        From 1 to the number of blocks; ties go to the lower block.

    Returns
    -------
    list of csr_array (n, m)
        One for each leading index, in C order: for ``sparse_attention``, head by head.

    Raises
    ------
    TypeError, ValueError
        Not real floating point; shapes that do not fit; top larger than the number of blocks.

    Notes
    -----
    Choosing costs 2 n (m / block) d FLOPs; attending then costs n top block pairs instead of n m.
    The choice is a constant: no gradient reaches q or k through it.

    References
    ----------
    Lu et al. 2025 (MoBA), arXiv:2502.13189, section 2.2; Yuan et al. 2025 (NSA),
    arXiv:2502.11089.

    Examples
    --------
    >>> q, k = np.array([[1.0], [-1.0]]), np.array([[2.0], [2.0], [-3.0]])
    >>> block_top_k(q, k, block=2, top=1)[0].toarray().astype(int)
    array([[1, 1, 0],
           [0, 0, 1]])
    """
    q, k, _, _ = checks.qkv(q, k, k)
    n, m = q.shape[-2], k.shape[-2]
    if m < 1:
        raise ValueError("k has 0 rows; expected at least one key to choose from")
    block = min(checks.whole("block", block, least=1), m)
    starts = np.arange(0, m, block)
    top = checks.whole("top", top, least=1, most=len(starts))
    sizes = np.minimum(block, m - starts)
    pooled = np.add.reduceat(k, starts, axis=-2) / sizes[:, None]  # (..., blocks, d)
    chosen = _largest(q @ pooled.mT, top)  # (..., n, blocks)
    heads = int(np.prod(chosen.shape[:-2]))
    seen = np.repeat(chosen, sizes, axis=-1).reshape(heads, n, m)
    return [scipy.sparse.csr_array(one) for one in seen]


def _largest(scores, k):
    """True at the k largest of the last axis; of equals, the first."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, order[..., :k], True, axis=-1)
    return chosen


def _scores(scores):
    scores = checks.floating("scores", scores)
    if scores.ndim < 1:
        raise ValueError("scores has shape (); expected (..., n)")
    return scores


def _sigmoid_inputs(x, w, b):
    x, w, b = (checks.floating(name, value) for name, value in (("x", x), ("w", w), ("b", b)))
    if x.ndim < 2:
        raise ValueError(f"x has shape {x.shape}; expected (..., n, c)")
    if w.ndim != 2 or w.shape[0] != x.shape[-1]:
        raise ValueError(f"w has shape {w.shape}; expected ({x.shape[-1]}, g), as x has columns")
    if b.shape != w.shape[1:]:
        raise ValueError(f"b has shape {b.shape}; expected {w.shape[1:]}, as w has columns")
    dtype, compute = x.dtype, checks.compute_dtype(x.dtype)
    w, b = (checks.real_option(name, a, dtype, compute) for name, a in (("w", w), ("b", b)))
    return x.astype(compute, copy=False), w, b, dtype
