"""The softmax of a row, and the fusion of attentions over parts of the keys."""

import numpy as np

from refattn import checks


def row_softmax(s):
    """Row-wise softmax and log-sum-exp; a row of -inf gives zeros and -inf."""
    top = s.max(axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(top == -np.inf, 0, top)  # so that an empty row is exp(-inf), not inf - inf
    p = np.exp(s - top)
    l = p.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):  # log 0 = -inf is the answer for an empty row
        lse = top + np.log(l)
    return p / np.where(l == 0, 1, l), lse[..., 0]


def merge_attention(ys, lses):
    r"""Attention over all keys, from attentions over parts of the keys.

    .. math:: y = \sum_p e^{lse_p - lse} y_p, \qquad lse = \log \sum_p e^{lse_p}

    Parameters
    ----------
    ys : sequence or array (parts, ..., n, e)
        Each part's output for the same queries.
    lses : sequence or array (parts, ..., n)
        Each part's log-sum-exp.

    Returns
    -------
    y : array (..., n, e)
        In the dtype of ys.
    lse : array (..., n)
        Hand both on to merge again: merging is associative, so parts may be fused in any grouping.

    Raises
    ------
    TypeError, ValueError
        Not real floating point; no parts; shapes that do not fit.

    Notes
    -----
    Cost: (2 e + 5) FLOPs a row and part, and 2 a row. A part with lse = -inf saw nothing and
    counts for nothing, whatever its y holds; where all are such, y = 0 and lse = -inf.

    References
    ----------
    Dao et al. 2022, arXiv:2205.14135, section 3.1; Liu et al. 2023, arXiv:2310.01889.

    Examples
    --------
    Two keys of equal weight, one in each part:

    >>> import numpy as np
    >>> y, lse = merge_attention([[[2.0]], [[4.0]]], [[0.0], [0.0]])
    >>> float(y[0, 0]), float(np.exp(lse[0]))
    (3.0, 2.0)
    """
    ys, lses = checks.floating("ys", ys), checks.floating("lses", lses)
    if ys.ndim < 3 or len(ys) < 1:
        raise ValueError(f"ys has shape {ys.shape}; expected (parts, ..., n, e), parts >= 1")
    if lses.shape != ys.shape[:-1]:
        raise ValueError(f"lses has shape {lses.shape}; expected {ys.shape[:-1]}, as ys has")
    dtype = ys.dtype
    compute = np.result_type(checks.compute_dtype(dtype), checks.compute_dtype(lses.dtype))
    ys, lses = ys.astype(compute), lses.astype(compute)
    weights, lse = row_softmax(np.moveaxis(lses, 0, -1))  # (..., n, parts), (..., n)
    weights = np.moveaxis(weights, -1, 0)[..., None]  # (parts, ..., n, 1)
    y = (weights * np.where(lses[..., None] == -np.inf, 0, ys)).sum(axis=0)
    return y.astype(dtype, copy=False), lse
