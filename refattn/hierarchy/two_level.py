"""Two-level attention (12.3.3): near keys one by one, each far block as one weighted summary."""

import numpy as np

from refattn import checks
from refattn.cost import Cost, qkvy_bytes, softmax_flops, working_size
from refattn.dispatch import backends, rows_of
from refattn.hierarchy.merged import spans
from refattn.softmax.formula import softmax_attention, softmax_attention_vjp

POOLS = ("mean", "max")


@backends
def two_level_attention(q, k, v, *, block, pool="mean", scale=None):
    r"""Attention to the own block's keys and to one pooled key of each other block, in one softmax.

    .. math:: y_i = \frac{\sum_{j \in B(i)} e^{s_{ij}} v_j
                        + \sum_{I \ne B(i)} |I|\, e^{\bar s_{iI}}\, \bar v_I}
                         {\sum_{j \in B(i)} e^{s_{ij}} + \sum_{I \ne B(i)} |I|\, e^{\bar s_{iI}}},
              \qquad s_{ij} = \mathrm{scale}\; q_i \cdot k_j,
              \quad \bar s_{iI} = \mathrm{scale}\; q_i \cdot \bar k_I

    B(i) is the block of position i; a bar is the mean or maximum over a block. The factor |I|
    enters as log(size) added to the score: a summary weighs as many keys as it stands for.

    Parameters
    ----------
    q : array (..., n, d)
    k : array (..., m, d)
    v : array (..., m, e)
        n = m. One dtype for the three; leading axes broadcast.
    block : int >= 1
        Positions of a block; the last may be shorter.
    pool : {"mean", "max"}
        How a block's keys, and its values, become one: their mean or elementwise maximum.
    scale : float, optional
        1/sqrt(d) if None.
    backend : {"numpy", "numba", "cuda"}

    Returns
    -------
    y : array (..., n, e)

    Raises
    ------
    TypeError
        As ``softmax_attention``; a block that is no integer.
    ValueError
        As ``softmax_attention``; block < 1, an unknown pool, n != m.
    BackendUnavailable
        The backend's code, library or driver is missing.

    Notes
    -----
    Cost: about 2 n (b + n/b) (d + e) FLOPs at blocks of b, least at b = sqrt(n), where it is
    4 n^1.5 (d + e) (``two_level_attention_cost``).

    Error: within eps * (2 (d + b + 5) (A + log b) + 2 b + M + 9) * max|v| of this formula, A as
    in ``softmax_attention`` and M blocks of b; after max-pooling, A of the columnwise maxima of
    |k|. Tested against 40 digits in tests/test_formulas.py.
    Measured worst, on refattn.verify.certain.hard: 1.2e-13 max|v|
    (logits of 1e4, cancelling values).

    Against softmax attention it is exact with one block, with blocks of one, and where the keys of
    each block agree (with mean pooling). Else, by Jensen, |I| exp(mean score) is at most the
    block's true mass: far blocks weigh too little, most of all where one key in the block matches
    sharply.
    A maximum has no such bound, and is not linear in the values.

    References
    ----------
    Zhu and Soricut 2021 (H-Transformer-1D), arXiv:2107.11906: the same idea on many levels.

    Examples
    --------
    Equal scores: the other block's summary counts twice, so all rows are the mean of all values.

    >>> import numpy as np
    >>> zero, v = np.zeros((4, 1)), np.array([[0.0], [2.0], [4.0], [9.0]])
    >>> two_level_attention(zero, zero, v, block=2).T
    array([[3.75, 3.75, 3.75, 3.75]])
    """
    rows = _all_rows(q, k, v, block, pool)
    return _attend(q, k, v, rows=rows, block=block, pool=pool, scale=scale)


@backends
def two_level_attention_vjp(dy, q, k, v, *, block, pool="mean", scale=None):
    r"""Gradient of ``two_level_attention``: from dy (..., n, e) to (dq, dk, dv).

    Each block of queries gives its part by ``softmax_attention_vjp``. What reaches a summary goes
    back through the pool: to all keys of the block alike, or column by column to the first key that
    attains the maximum (a subgradient where several do),

    .. math:: \bar k_I = \frac{1}{|I|} \sum_{j \in I} k_j \;\Rightarrow\;
              dk_j \mathrel{+}= d\bar k_I / |I|

    Parameters
    ----------
    dy : array (..., n, e)
        Gradient of a scalar with respect to y.
    q, k, v, block, pool, scale, backend
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
    Equal scores: all values count alike, near or summarised.

    >>> import numpy as np
    >>> zero = np.zeros((4, 1))
    >>> dq, dk, dv = two_level_attention_vjp(np.ones((4, 1)), zero, zero, zero, block=2)
    >>> dv.T
    array([[1., 1., 1., 1.]])
    """
    rows = _all_rows(q, k, v, block, pool)
    return _attend_vjp(dy, q, k, v, rows=rows, block=block, pool=pool, scale=scale)


def two_level_attention_cost(n, m, d, e, *, block, pool="mean", scale=None, itemsize=4):
    """Counted cost of ``two_level_attention`` for one head, by the rule of ``refattn.cost``.

    Parameters
    ----------
    n, m, d, e : int
        Queries, keys, columns of q and k, columns of v.
    block, pool
        As in the forward. ``scale`` costs the same whatever it is.
    itemsize : int
        Bytes of one number.

    Returns
    -------
    Cost

    Notes
    -----
    A query meets the b keys of its block and M - 1 summaries; each of the latter costs one more
    addition, of the logarithm of its size. A mean is a sum and a division, a maximum one comparison
    an entry; each block takes one logarithm.

    Examples
    --------
    Two blocks of two: 4 queries with 3 scores each, 4 additions, 8 for the sums, 4 divisions, 2
    logarithms.

    >>> two_level_attention_cost(4, 4, 1, 1, block=2).flops == 12 * 10 + 4 + 8 + 4 + 2
    True
    """
    n, m, d, e = checks.sizes(n, m, d, e)
    block = checked_sizes(n, m, block, pool)
    b, parts = min(block, n), -(-n // block)
    far = n * max(0, parts - 1)
    pairs = n // block * block**2 + (n % block) ** 2 + far
    pooling = (n + (parts if pool == "mean" else 0)) * (d + e)
    flops = softmax_flops(pairs, d, e) + far + pooling + parts
    seen = max(0, b + parts - 1)
    # summaries of all blocks; keys and values that one block of queries sees; their scores
    workspace = working_size(itemsize) * (parts * (d + e) + seen * (d + e) + b * seen)
    return Cost(flops, qkvy_bytes(n, m, d, e, itemsize), workspace)


def _cost_of_rows(rows, n, m, d, e, *, block, pool="mean", scale=None, itemsize=4):
    """All summaries are made; each open row meets its own block and the others' summaries."""
    whole = two_level_attention_cost(n, m, d, e, block=block, pool=pool, itemsize=itemsize)
    closed = np.setdiff1d(np.arange(n), rows)
    start = closed // block * block
    far = len(closed) * max(0, -(-n // block) - 1)
    pairs = int((np.minimum(n, start + block) - start).sum()) + far
    moved = qkvy_bytes(len(rows), m, d, e, itemsize)
    return Cost(whole.flops - softmax_flops(pairs, d, e) - far, moved, whole.workspace)


@rows_of(two_level_attention, cost=_cost_of_rows)
def _rows(rows, n, m, *, block, pool="mean", scale=None):
    """Queries are independent of each other, but each must know its block."""
    block = checked_sizes(n, m, block, pool)
    return _attend, _attend_vjp, {"rows": rows, "block": block, "pool": pool, "scale": scale}


def _attend(q, k, v, *, rows, block, pool, scale):
    """Two-level attention of the queries q (..., len(rows), d) that stand at ``rows``, sorted."""
    q, k, v, dtype = checks.qkv(q, k, v)
    y = np.zeros((*checks.lead(q, k, v), q.shape[-2], v.shape[-1]), q.dtype)
    for mine, keys, values, bias, *_ in _blocks(rows, k, v, block, pool):
        y[..., mine, :] = softmax_attention(q[..., mine, :], keys, values, bias=bias, scale=scale)
    return y.astype(dtype, copy=False)


def _attend_vjp(dy, q, k, v, *, rows, block, pool, scale):
    """Gradient of ``_attend``."""
    q, k, v, dtype = checks.qkv(q, k, v)
    dy = checks.cotangent("dy", dy, (*checks.lead(q, k, v), q.shape[-2], v.shape[-1]), dtype)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    parts = spans(k.shape[-2], block)
    dk_pool, dv_pool = (np.zeros((*x.shape[:-2], len(parts), x.shape[-1]), x.dtype) for x in (k, v))
    for mine, keys, values, bias, own, far in _blocks(rows, k, v, block, pool):
        dq[..., mine, :], dkeys, dvalues, _ = softmax_attention_vjp(
            dy[..., mine, :], q[..., mine, :], keys, values, bias=bias, scale=scale
        )
        size = own.stop - own.start
        # keys = [k[own], k_pool[far]]
        dk[..., own, :] += dkeys[..., :size, :]
        dv[..., own, :] += dvalues[..., :size, :]
        dk_pool[..., far, :] += dkeys[..., size:, :]
        dv_pool[..., far, :] += dvalues[..., size:, :]
    unpool(dk, dk_pool, k, parts, pool)
    unpool(dv, dv_pool, v, parts, pool)
    return tuple(g.astype(dtype, copy=False) for g in (dq, dk, dv))


def _blocks(rows, k, v, block, pool):
    """For each block that has queries: which of them, and the keys, values and bias they see.

    Also where these come from: the slice of own keys, and the other blocks' numbers.
    """
    parts = spans(k.shape[-2], block)
    k_pool, v_pool = pooled(k, parts, pool), pooled(v, parts, pool)  # (..., M, d), (..., M, e)
    sizes = np.array([own.stop - own.start for own in parts])
    for i, own in enumerate(parts):
        start, stop = np.searchsorted(rows, (own.start, own.stop))
        if start == stop:
            continue
        far = np.delete(np.arange(len(parts)), i)
        keys = np.concatenate((k[..., own, :], k_pool[..., far, :]), axis=-2)
        values = np.concatenate((v[..., own, :], v_pool[..., far, :]), axis=-2)
        bias = np.concatenate((np.zeros(sizes[i]), np.log(sizes[far]))).astype(k.dtype)
        yield slice(start, stop), keys, values, bias, own, far


def pooled(x, parts, pool):
    """One row a block: (..., M, c)."""
    summary = np.empty((*x.shape[:-2], len(parts), x.shape[-1]), x.dtype)
    for i, own in enumerate(parts):
        inside = x[..., own, :]
        summary[..., i, :] = inside.mean(axis=-2) if pool == "mean" else inside.max(axis=-2)
    return summary


def unpool(dx, dsummary, x, parts, pool):
    """Add the gradient of ``pooled(x)`` to dx."""
    for i, own in enumerate(parts):
        inside, d = dx[..., own, :], dsummary[..., i, None, :]
        if pool == "mean":
            inside += d / (own.stop - own.start)
        else:
            first = x[..., own, :].argmax(axis=-2)[..., None, :]
            first = np.broadcast_to(first, d.shape)  # x may have fewer leading axes than dx
            kept = np.take_along_axis(inside, first, axis=-2)
            np.put_along_axis(inside, first, kept + d, axis=-2)


def _all_rows(q, k, v, block, pool):
    """Every query's position, once q, k, v and the options are found to fit."""
    q, k, *_ = checks.qkv(q, k, v)
    checked_sizes(q.shape[-2], k.shape[-2], block, pool)
    return np.arange(q.shape[-2])


def checked_sizes(n, m, block, pool):
    """The checked block."""
    block = checks.whole("block", block, least=1)
    checks.choice("pool", pool, POOLS)
    if n != m:
        raise ValueError(f"q has {n} rows, k has {m}: two_level_attention needs them to agree")
    return block
