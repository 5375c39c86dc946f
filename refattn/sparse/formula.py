"""Sparse attention (12.3.1): a window of k neighbours, or any pattern of pairs.

Both cost O(n k) for k keys a query. Local attention goes by bands, since its pattern is known;
sparse attention goes by the stored pairs of a csr mask.
"""

import numpy as np

from refattn import checks, masks
from refattn.arrays import gradients
from refattn.cost import Cost, qkvy_bytes, softmax_flops, working_size
from refattn.dispatch import backends, rows_of
from refattn.softmax.formula import softmax_attention, softmax_attention_vjp
from refattn.sparse.pairs import PAIRS, csr_matmul, pair_dots, pair_weights, per_pair, row_reduce

BLOCK = 64  # queries whose windows are computed together in local attention


@backends
def local_attention(q, k, v, *, window, causal=False, dilation=1, scale=None):
    r"""Attention to the neighbours within a window.

    .. math:: y_i = \sum_{t=-left}^{right} P_{it}\, v_{j(t)}, \qquad
              j(t) = i + (m - n) + t \cdot \mathrm{dilation}

    P is the softmax, over the t whose key exists, of scale * q_i . k_j(t).

    Parameters
    ----------
    q : array (..., n, d)
    k : array (..., m, d)
    v : array (..., m, e)
        One dtype for the three; leading axes broadcast.
    window : int or (int, int)
        Keys to the left and to the right, both inclusive: k = left + right + 1 keys a query.
        An integer w is (w, w).
    causal : bool
        Sets right to 0.
    dilation : int >= 1
        Distance between neighbouring keys of a window.
    scale : float, optional
        1/sqrt(d) if None.
    backend : {"numpy", "numba", "cuda"}

    Returns
    -------
    y : array (..., n, e)
        A query whose window holds no key has y = 0.

    Raises
    ------
    TypeError, ValueError
        As ``softmax_attention``; ValueError for window < 0 or dilation < 1.
    BackendUnavailable
        The backend's code, library or driver is missing.

    Notes
    -----
    Cost: about 2 n k (d + e) FLOPs for the pairs of the window. Queries are taken 64 at a time
    against the k + 63 keys that they can reach together, so the workspace is 64 (k + 63) numbers,
    whatever n, and time is O(n (k + 63)). A dilated window meets only keys of one residue
    modulo the dilation, so each residue is an undilated problem of its own.

    Error: as ``softmax_attention``, with k in the place of m.
    Measured worst, on refattn.verify.certain.hard: 1.6e-13 max|v| (logits of 1e4).

    References
    ----------
    Beltagy et al. 2020 (Longformer), arXiv:2004.05150, section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> zero, v = np.zeros((4, 1)), np.array([[0.0], [2.0], [4.0], [9.0]])
    >>> local_attention(zero, zero, v, window=1).T
    array([[1. , 2. , 5. , 6.5]])
    """
    q, k, v, dtype = checks.qkv(q, k, v)
    scale = checks.scale(scale, q.shape[-1])
    y = np.zeros((*checks.lead(q, k, v), q.shape[-2], v.shape[-1]), q.dtype)
    for rows, keys, mask in _bands(q.shape[-2], k.shape[-2], window, causal, dilation):
        y[..., rows, :] = softmax_attention(
            q[..., rows, :], k[..., keys, :], v[..., keys, :], mask=mask, scale=scale
        )
    return y.astype(dtype, copy=False)


@backends
def local_attention_vjp(dy, q, k, v, *, window, causal=False, dilation=1, scale=None):
    """Gradient of ``local_attention``: from dy (..., n, e) to (dq, dk, dv).

    Each band of queries gives its part by ``softmax_attention_vjp``, whose equation holds; a key
    collects from all bands that see it.

    Parameters
    ----------
    dy : array (..., n, e)
        Gradient of a scalar with respect to y.
    q, k, v, window, causal, dilation, scale, backend
        As in the forward.

    Returns
    -------
    (dq, dk, dv) : arrays in the shapes of q, k and v, in q's dtype.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As the forward; ValueError for a dy that has not the shape of y.

    Examples
    --------
    >>> import numpy as np
    >>> zero = np.zeros((3, 1))
    >>> dq, dk, dv = local_attention_vjp(np.ones((3, 1)), zero, zero, zero, window=(1, 0))
    >>> dv.T  # key 0 is seen by query 0 alone and by query 1 with weight 1/2
    array([[1.5, 1. , 0.5]])
    """
    q, k, v, dtype = checks.qkv(q, k, v)
    scale = checks.scale(scale, q.shape[-1])
    shape = (*checks.lead(q, k, v), q.shape[-2], v.shape[-1])
    dy = checks.cotangent("dy", dy, shape, dtype)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for rows, keys, mask in _bands(q.shape[-2], k.shape[-2], window, causal, dilation):
        band = dy[..., rows, :], q[..., rows, :], k[..., keys, :], v[..., keys, :]
        part = softmax_attention_vjp(*band, mask=mask, scale=scale)
        dq[..., rows, :] += part[0]
        dk[..., keys, :] += part[1]
        dv[..., keys, :] += part[2]
    return tuple(g.astype(dtype, copy=False) for g in (dq, dk, dv))


def local_attention_cost(n, m, d, e, *, window, causal=False, dilation=1, scale=None, itemsize=4):
    """Counted cost of ``local_attention`` for one head, by the rule of ``refattn.cost``.

    Parameters
    ----------
    n, m, d, e : int
        Queries, keys, columns of q and k, columns of v.
    window, causal, dilation
        As in the forward: the pairs are those of the window that exist. ``scale`` costs the same
        whatever it is.
    itemsize : int
        Bytes of one number.

    Returns
    -------
    Cost

    Examples
    --------
    Four tokens that each see themselves and one neighbour to the left make 7 pairs:

    >>> local_attention_cost(4, 4, 1, 1, window=(1, 0)).flops == 7 * (2 + 1 + 5 + 2)
    True
    """
    n, m, d, e = checks.sizes(n, m, d, e)
    _, count = masks.window_keys(n, m, window, causal, dilation)
    left, right, dilation = masks.reach(n, m, window, causal, dilation)
    reach = min(BLOCK, n) * min(left + right + min(BLOCK, n), -(-m // dilation))
    flops = softmax_flops(int(count.sum()), d, e)
    return Cost(flops, qkvy_bytes(n, m, d, e, itemsize), working_size(itemsize) * reach)


@backends
@np.errstate(invalid="ignore", over="ignore")
def sparse_attention(q, k, v, *, mask, scale=None):
    r"""Attention over the stored pairs of a sparse mask.

    .. math:: y_i = \sum_{j \in J_i} P_{ij} v_j, \qquad J_i = \{ j : \mathrm{mask}_{ij} \}

    P is the softmax over J_i of scale * q_i . k_j.

    Parameters
    ----------
    q : array (..., n, d)
    k : array (..., m, d)
    v : array (..., m, e)
        One dtype for the three; leading axes broadcast.
    mask : scipy.sparse.csr_array (n, m) of bool
        Shared by all leading axes; an explicit False is not attended. ``refattn.masks`` makes them.
    scale : float, optional
        1/sqrt(d) if None.
    backend : {"numpy", "numba", "cuda"}

    Returns
    -------
    y : array (..., n, e)
        A query with no pair has y = 0.

    Raises
    ------
    TypeError, ValueError
        As ``softmax_attention``; TypeError for a mask that is not a boolean csr_array.
    BackendUnavailable
        The backend's code, library or driver is missing.

    Notes
    -----
    Cost: about 2 nnz (d + e) FLOPs; workspace nnz scores, and 1024 pairs of rows at a time for
    their dot products.

    Error: as ``softmax_attention``, with the longest row in the place of m.
    Measured worst, on refattn.verify.certain.hard: 2.1e-13 max|v|
    (logits of 1e4, cancelling values).

    References
    ----------
    Child et al. 2019 (Sparse Transformer), arXiv:1904.10509, section 4.2.

    Examples
    --------
    >>> import numpy as np, refattn
    >>> zero, v = np.zeros((4, 1)), np.array([[0.0], [2.0], [4.0], [9.0]])
    >>> sparse_attention(zero, zero, v, mask=refattn.masks.block_diagonal(4, 2)).T
    array([[1. , 1. , 6.5, 6.5]])
    """
    q, k, v, dtype = checks.qkv(q, k, v)
    mask = checks.csr_mask(mask, q.shape[-2], k.shape[-2])
    p = pair_weights(q, k, mask, checks.scale(scale, q.shape[-1]))
    return csr_matmul(p, mask, v).astype(dtype, copy=False)


@backends
@np.errstate(invalid="ignore", over="ignore")
def sparse_attention_vjp(dy, q, k, v, *, mask, scale=None):
    """Gradient of ``sparse_attention``: from dy (..., n, e) to (dq, dk, dv).

    The equations of ``softmax_attention_vjp``, with P, dP and dS held at the stored pairs only.

    Parameters
    ----------
    dy : array (..., n, e)
        Gradient of a scalar with respect to y.
    q, k, v, mask, scale, backend
        As in the forward.

    Returns
    -------
    (dq, dk, dv) : arrays in the shapes of q, k and v, in q's dtype.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As the forward; ValueError for a dy that has not the shape of y.

    Examples
    --------
    >>> import numpy as np, refattn
    >>> zero, mask = np.zeros((2, 1)), refattn.masks.causal(2)
    >>> sparse_attention_vjp(np.ones((2, 1)), zero, zero, zero, mask=mask)[2].T
    array([[1.5, 0.5]])
    """
    q, k, v, dtype = checks.qkv(q, k, v)
    shape = (*checks.lead(q, k, v), q.shape[-2], v.shape[-1])
    dy = checks.cotangent("dy", dy, shape, dtype)
    mask = checks.csr_mask(mask, q.shape[-2], k.shape[-2])
    scale = checks.scale(scale, q.shape[-1])
    p = pair_weights(q, k, mask, scale)  # (..., nnz)
    # y = P @ v
    dp = pair_dots(dy, v, mask)
    dv = csr_matmul(p, mask, dy, transpose=True)
    # P = softmax over each row
    ds = scale * p * (dp - per_pair(row_reduce(np.add, p * dp, mask), mask))
    # s = scale * q @ k.T
    dq = csr_matmul(ds, mask, k)
    dk = csr_matmul(ds, mask, q, transpose=True)
    return gradients((dq, dk, dv), (q.shape, k.shape, v.shape), dtype)


def sparse_attention_cost(n, m, d, e, *, nnz, scale=None, itemsize=4):
    """Counted cost of ``sparse_attention`` for one head, by the rule of ``refattn.cost``.

    Parameters
    ----------
    n, m, d, e : int
        Queries, keys, columns of q and k, columns of v.
    nnz : int
        Pairs of the mask. ``scale`` costs the same whatever it is.
    itemsize : int
        Bytes of one number.

    Returns
    -------
    Cost

    Examples
    --------
    >>> sparse_attention_cost(4, 4, 1, 1, nnz=8).flops
    80
    """
    n, m, d, e = checks.sizes(n, m, d, e)
    nnz = checks.whole("nnz", nnz, least=0, most=n * m)
    stored = nnz * (1 + 4) + 4 * (n + 1)
    moved = qkvy_bytes(n, m, d, e, itemsize) + stored
    workspace = working_size(itemsize) * (nnz + min(PAIRS, nnz) * 2 * d)
    return Cost(softmax_flops(nnz, d, e), moved, workspace)


def _cost_of_window_rows(
    rows, n, m, d, e, *, window, causal=False, dilation=1, scale=None, itemsize=4
):
    count = masks.window_keys(n, m, window, causal, dilation)[1][np.asarray(rows, int)]
    pairs = sparse_attention_cost(len(rows), m, d, e, nnz=count.sum(), itemsize=itemsize)
    return Cost(pairs.flops, qkvy_bytes(len(rows), m, d, e, itemsize), pairs.workspace)


@rows_of(local_attention, cost=_cost_of_window_rows)
def _some_windows(rows, n, m, *, window, causal=False, dilation=1, **options):
    """The pairs of the windows that are left."""
    mask = masks.local(n, window, m=m, causal=causal, dilation=dilation)[rows]
    return sparse_attention, sparse_attention_vjp, {**options, "mask": mask}


@rows_of(sparse_attention)
def _some_pairs(rows, n, m, *, mask, **options):
    mask = checks.csr_mask(mask, n, m)[rows]
    return sparse_attention, sparse_attention_vjp, {**options, "mask": mask}


def _bands(n, m, window, causal, dilation):
    """Bands of up to BLOCK queries: their slice, the slice of keys they reach, and who sees whom.

    Query i stands at position i + (m - n), and meets only keys of the same residue modulo the
    dilation; inside a residue, positions are renumbered 0, 1, 2, ... and the window is undilated.
    """
    left, right, dilation = masks.reach(n, m, window, causal, dilation)
    for residue in range(min(dilation, m)):
        last = (m - 1 - residue) // dilation
        for start in range((residue - (m - n)) % dilation, n, BLOCK * dilation):
            rows = slice(start, min(n, start + BLOCK * dilation), dilation)
            i = (np.arange(start, rows.stop, dilation) + (m - n) - residue) // dilation
            low, high = max(0, i[0] - left), min(last, i[-1] + right)
            if low <= high:
                j = np.arange(low, high + 1)
                keys = slice(residue + low * dilation, residue + high * dilation + 1, dilation)
                yield rows, keys, (i[:, None] - left <= j) & (j <= i[:, None] + right)
