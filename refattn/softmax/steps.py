"""From the textbook formula to FlashAttention in four functions, each one idea further.

``naive`` writes the formula down; ``stable`` subtracts the maximum; ``online`` reads the keys once,
one at a time; ``tiled`` reads them in blocks, as FlashAttention does. All take one head,
q (n, d), k (m, d), v (m, e), and give y (n, e).
"""

import math
from typing import NamedTuple

import numpy as np

from refattn import checks


class Traffic(NamedTuple):
    """Numbers moved between large and fast memory."""

    loads: int
    stores: int


def naive(q, k, v, *, scale=None):
    r"""The formula as it is printed.

    .. math:: y = \mathrm{softmax}(\mathrm{scale}\; q k^T)\, v

    Overflows to NaN where a score passes log(max float): 709 in float64, 88 in float32.

    >>> import numpy as np
    >>> naive(np.zeros((1, 1)), np.zeros((2, 1)), np.array([[1.0], [3.0]]))
    array([[2.]])
    """
    q, k, v, scale = _one_head(q, k, v, scale)
    a = np.exp(scale * (q @ k.T))  # (n, m)
    return (a @ v) / a.sum(axis=1, keepdims=True)


def stable(q, k, v, *, scale=None):
    r"""The same, with each row's maximum subtracted: exp(s - c) / sum exp(s - c) for any c.

    With c the maximum, no exponent is positive and one is 0: no overflow, no 0 / 0.

    >>> import numpy as np
    >>> stable(np.full((1, 1), 1e4), np.ones((2, 1)), np.array([[1.0], [3.0]]))
    array([[2.]])
    """
    q, k, v, scale = _one_head(q, k, v, scale)
    s = scale * (q @ k.T)  # (n, m)
    a = np.exp(s - s.max(axis=1, keepdims=True))
    return (a @ v) / a.sum(axis=1, keepdims=True)


def online(q, k, v, *, scale=None):
    r"""One pass over the keys: maximum, sum and output are corrected as each key arrives.

    .. math:: m' = \max(m, s_j), \quad l' = e^{m - m'} l + e^{s_j - m'}, \quad
              a' = e^{m - m'} a + e^{s_j - m'} v_j

    At the end y = a / l. No row of scores is ever whole: workspace O(n e), not O(n m).

    References: Milakov & Gimelshein 2018, arXiv:1805.02867, for m and l; Rabe & Staats 2021,
    arXiv:2112.05682, for a too.

    >>> import numpy as np
    >>> online(np.full((1, 1), 1e4), np.ones((2, 1)), np.array([[1.0], [3.0]]))
    array([[2.]])
    """
    q, k, v, scale = _one_head(q, k, v, scale)
    top = np.full(len(q), -np.inf, q.dtype)
    l = np.zeros(len(q), q.dtype)
    a = np.zeros((len(q), v.shape[1]), q.dtype)
    for k_j, v_j in zip(k, v, strict=True):
        s = scale * (q @ k_j)  # (n,)
        new = np.maximum(top, s)
        keep, add = np.exp(top - new), np.exp(s - new)
        l = keep * l + add
        a = keep[:, None] * a + add[:, None] * v_j
        top = new
    return a / l[:, None]


def tiled(q, k, v, *, block_q, block_k, scale=None):
    r"""FlashAttention's algorithm 1: the online step, a block of keys at a time.

    The outer loop loads a block of k and v once; the inner loop passes over all queries, and for
    each block of them loads q, y, l and the maximum, folds the new keys in, and stores y, l and the
    maximum. Only tiles of block_q x block_k scores exist.

    Parameters
    ----------
    q, k, v : arrays (n, d), (m, d), (m, e)
    block_q, block_k : int >= 1
        Tile sizes B_r and B_c. With fast memory for M numbers the paper takes B_c = ceil(M / 4d)
        and B_r = min(B_c, d).
    scale : float, optional
        1/sqrt(d) if None.

    Returns
    -------
    y : array (n, e)
    lse : array (n,)
    traffic : Traffic
        Numbers loaded and stored. With T_c = ceil(m / block_k) the counts come to
        m (d + e) + T_c n (d + e + 2) loads and T_c n (e + 2) stores.

    References
    ----------
    Dao et al. 2022, arXiv:2205.14135, algorithm 1 and theorem 2.

    Examples
    --------
    >>> import numpy as np
    >>> y, lse, traffic = tiled(np.zeros((2, 1)), np.zeros((4, 1)), np.ones((4, 1)),
    ...                         block_q=1, block_k=2)
    >>> y.tolist(), traffic
    ([[1.0], [1.0]], Traffic(loads=24, stores=12))
    """
    q, k, v, scale = _one_head(q, k, v, scale)
    block_q = checks.whole("block_q", block_q, least=1)
    block_k = checks.whole("block_k", block_k, least=1)
    y = np.zeros((len(q), v.shape[1]), q.dtype)
    top = np.full((len(q), 1), -np.inf, q.dtype)
    l = np.zeros((len(q), 1), q.dtype)
    loads = stores = 0
    for j in range(0, len(k), block_k):
        k_j, v_j = k[j : j + block_k], v[j : j + block_k]
        loads += k_j.size + v_j.size
        for i in range(0, len(q), block_q):
            rows = slice(i, i + block_q)
            loads += q[rows].size + y[rows].size + l[rows].size + top[rows].size
            s = scale * (q[rows] @ k_j.T)  # (block_q, block_k)
            new = np.maximum(top[rows], s.max(axis=1, keepdims=True))
            keep, p = np.exp(top[rows] - new), np.exp(s - new)
            l_new = keep * l[rows] + p.sum(axis=1, keepdims=True)
            y[rows] = (keep * l[rows] * y[rows] + p @ v_j) / l_new
            l[rows], top[rows] = l_new, new
            stores += y[rows].size + l[rows].size + top[rows].size
    return y, (top + np.log(l))[:, 0], Traffic(loads, stores)


def tile_sizes(fast, d):
    """FlashAttention's (block_q, block_k) for fast memory that holds this many numbers.

    >>> tile_sizes(16384, 64)
    (64, 64)
    """
    fast, d = checks.whole("fast", fast, least=1), checks.whole("d", d, least=1)
    block_k = math.ceil(fast / (4 * d))
    return min(block_k, d), block_k


def _one_head(q, k, v, scale):
    q, k, v, _ = checks.qkv(q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 2:
            raise ValueError(f"{name} has shape {x.shape}; these steps take one head, 2 axes")
    if len(k) == 0:
        raise ValueError("k and v have 0 rows; these steps need at least one key")
    return q, k, v, checks.scale(scale, q.shape[-1])
