"""Softmax attention, the chapter's first formula: the truth in NumPy, its gradient, its cost."""

import numpy as np

from refattn import checks
from refattn.arrays import gradients, masked_matmul
from refattn.cost import Cost, causal_pairs, qkvy_bytes, softmax_flops, working_size
from refattn.dispatch import backends, rows_of
from refattn.softmax.merge import row_softmax


@backends
@np.errstate(invalid="ignore", over="ignore")  # in the score of a hidden pair: no news
def softmax_attention(
    q,
    k,
    v,
    *,
    mask=None,
    bias=None,
    causal=False,
    scale=None,
    softcap=None,
    return_lse=False,
):
    r"""Scaled dot-product attention.

    .. math:: y_i = \sum_j P_{ij} v_j, \qquad P_{ij} = \frac{\exp s_{ij}}{\sum_l \exp s_{il}},
              \qquad s_{ij} = \mathrm{scale}\; q_i \cdot k_j

    The order is: scale, softcap, bias, mask, softmax.

    Parameters
    ----------
    q : array (..., n, d)
    k : array (..., m, d)
    v : array (..., m, e)
        One dtype for the three; leading axes broadcast.
    mask : bool array broadcasting to (..., n, m), optional
        True where query i may attend to key j.
    bias : real array broadcasting to (..., n, m), optional
        Added to the scores; -inf hides a pair.
    causal : bool
        Query i sees keys j <= i + (m - n): the last query sees the last key.
    scale : float, optional
        1/sqrt(d) if None.
    softcap : float > 0, optional
        Replaces s by softcap * tanh(s / softcap).
    return_lse : bool
        Also return the log-sum-exp of each row of scores, in the dtype of the arithmetic.
    backend : {"numpy", "numba", "cuda"}

    Returns
    -------
    y : array (..., n, e)
    lse : array (..., n)
        Only with ``return_lse``. A row with nothing to attend has y = 0 and lse = -inf.

    Raises
    ------
    TypeError
        A dtype that is not real floating point, mixed dtypes, a mask that is not boolean.
    ValueError
        Shapes that do not fit; a scale or softcap that is not finite.
    BackendUnavailable
        The backend's code, library or driver is missing.

    Notes
    -----
    Cost: about 2 n m (d + e) FLOPs, and workspace for one n x m array (``softmax_attention_cost``).

    Error: within eps * (2 (d + 4) A + m + 8) * max|v|, where A = 1 + the largest
    scale * sum_c |q_ic k_jc| + |bias_ij| of a visible pair. Tested against 40 digits in
    tests/test_formulas.py.
    Measured worst, on refattn.verify.certain.hard: 1.9e-13 max|v|
    (logits of 1e4, cancelling values).

    A NaN or infinity in a key or value reaches only the queries that may see it.

    References
    ----------
    Vaswani et al. 2017, arXiv:1706.03762, equation 1.

    Examples
    --------
    Equal scores give the mean of the values that may be seen:

    >>> import numpy as np
    >>> v = np.array([[2.0], [4.0], [9.0]])
    >>> softmax_attention(np.zeros((3, 1)), np.zeros((3, 1)), v, causal=True)
    array([[2.],
           [3.],
           [5.]])
    """
    checks.flag("return_lse", return_lse)
    q, k, v, dtype = checks.qkv(q, k, v)
    bias, allowed = _visible(q, k, v, dtype, mask, bias, causal)
    s, _ = _scores(q, k, bias, allowed, scale, softcap)  # (..., n, m)
    p, lse = row_softmax(s)  # (..., n, m), (..., n)
    y = masked_matmul(p, v, allowed).astype(dtype, copy=False)  # (..., n, e)
    if not return_lse:
        return y
    return y, np.array(np.broadcast_to(lse, y.shape[:-1]))


@backends
@np.errstate(invalid="ignore", over="ignore")
def softmax_attention_vjp(
    dy,
    q,
    k,
    v,
    *,
    mask=None,
    bias=None,
    causal=False,
    scale=None,
    softcap=None,
    return_lse=False,
    dlse=None,
    saved=None,
):
    r"""Gradient of ``softmax_attention``: from dy (..., n, e) to (dq, dk, dv), and dbias if given.

    .. math:: dV = P^T dY, \quad dP = dY V^T, \quad
              dS_{ij} = P_{ij} \Big(dP_{ij} - \sum_l P_{il} dP_{il} + dlse_i\Big), \quad
              dQ = \mathrm{scale}\, dS\, K, \quad dK = \mathrm{scale}\, dS^T Q

    Parameters
    ----------
    dy : array (..., n, e)
        Gradient of a scalar with respect to y.
    dlse : array (..., n), optional
        Gradient with respect to lse.
    saved : (y, lse), optional
        What the forward gave on these arguments with ``return_lse``: a compiled kernel then need
        not compute it again. The formula does, and only looks at the shapes.
    q, k, v, mask, bias, causal, scale, softcap, backend
        As in the forward. ``return_lse`` is accepted, so that one dict of options serves both.

    Returns
    -------
    tuple of arrays
        dq, dk, dv and, where a bias came in, dbias: each in the shape of its input, in q's dtype.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As the forward; ValueError for a dy or dlse that has not the shape of its output.

    Notes
    -----
    Cost: five matrix products against the forward's two; P is computed again, not kept.
    A row with nothing to attend has gradient 0.

    References
    ----------
    Dao et al. 2022, arXiv:2205.14135, appendix B.2.

    Examples
    --------
    One key takes all the weight, so the scores have no gradient:

    >>> import numpy as np
    >>> one = np.ones((1, 1))
    >>> dq, dk, dv = softmax_attention_vjp(5 * one, one, one, one)
    >>> float(dq[0, 0]), float(dk[0, 0]), float(dv[0, 0])
    (0.0, 0.0, 5.0)
    """
    checks.flag("return_lse", return_lse)
    q, k, v, dtype = checks.qkv(q, k, v)
    rows = (*checks.lead(q, k, v), q.shape[-2])
    dy = checks.cotangent("dy", dy, (*rows, v.shape[-1]), dtype)
    checks.saved(saved, (*rows, v.shape[-1]), q.dtype)
    bias_shape = np.shape(bias)
    bias, allowed = _visible(q, k, v, dtype, mask, bias, causal)
    s, slope = _scores(q, k, bias, allowed, scale, softcap)

    def seen(x):
        return x if allowed is None else np.where(allowed, x, 0)

    p = seen(row_softmax(s)[0])  # a row that saw a NaN is NaN all over

    # y = P @ v
    dp = dy @ v.mT  # (..., n, m)
    dv = masked_matmul(p.mT, dy, None if allowed is None else allowed.mT)
    # P = exp(s - lse)
    ds = seen(p * dp)
    pull = ds.sum(axis=-1, keepdims=True)  # (..., n, 1)
    if dlse is not None:
        pull = pull - checks.cotangent("dlse", dlse, rows, q.dtype)[..., None]
    ds = seen(ds - p * pull)
    dbias = ds
    # s = scale * q @ k.T, capped
    ds = checks.scale(scale, q.shape[-1]) * (ds if slope is None else seen(ds * slope))
    dq = masked_matmul(ds, k, allowed)
    dk = masked_matmul(ds.mT, q, None if allowed is None else allowed.mT)

    found, shapes = [dq, dk, dv], [q.shape, k.shape, v.shape]
    if bias is not None:
        found, shapes = [*found, dbias], [*shapes, bias_shape]
    return gradients(found, shapes, dtype)


def softmax_attention_cost(
    n,
    m,
    d,
    e,
    *,
    nnz=None,
    mask=None,
    bias=False,
    causal=False,
    scale=None,
    softcap=None,
    return_lse=False,
    itemsize=4,
):
    """Counted cost of ``softmax_attention`` for one head, by the rule of ``refattn.cost``.

    Parameters
    ----------
    n, m, d, e : int
        Queries, keys, columns of q and k, columns of v.
    nnz : int, optional
        Visible pairs, where a mask or -inf in the bias hides some (with causal, those of both);
        else n m, or those of ``causal``.
    mask : bool, optional
        Whether a boolean mask is read; if None, where ``nnz`` is given.
    bias, causal, softcap, return_lse
        Whether each is in use; ``scale`` costs the same whatever it is.
    itemsize : int
        Bytes of one number.

    Returns
    -------
    Cost

    Examples
    --------
    >>> softmax_attention_cost(1, 1, 1, 1)
    Cost(flops=10, bytes=16, workspace=4)
    """
    n, m, d, e = checks.sizes(n, m, d, e)
    read_mask = nnz is not None if mask is None else checks.flag("mask", mask)
    if nnz is not None:
        pairs = checks.whole("nnz", nnz, least=0, most=n * m)
    else:
        pairs = causal_pairs(n, m) if checks.flag("causal", causal) else n * m
    checks.flag("bias", bias)
    working = working_size(itemsize)
    flops = softmax_flops(pairs, d, e)
    flops += pairs * (1 if bias else 0)
    flops += pairs * (3 if softcap else 0)  # divide, tanh, multiply
    flops += n * (2 if return_lse else 0)  # log, add
    moved = qkvy_bytes(n, m, d, e, itemsize)
    moved += n * m * (1 if read_mask else 0)
    moved += itemsize * (n * m if bias else 0) + working * (n if return_lse else 0)
    return Cost(flops, moved, working * n * m)


def _cost_of_rows(rows, n, m, d, e, *, causal=False, nnz=None, **sizes):
    if causal and nnz is None:
        seen = np.clip(np.asarray(rows) + (m - n) + 1, 0, m)
        return softmax_attention_cost(len(rows), m, d, e, nnz=seen.sum(), mask=False, **sizes)
    return softmax_attention_cost(len(rows), m, d, e, nnz=nnz, **sizes)


def _causal_alone(sizes):
    return bool(sizes.get("causal")) and sizes.get("nnz") is None


@rows_of(softmax_attention, cost=_cost_of_rows, by_position=_causal_alone)
def _some_rows(rows, n, m, *, mask=None, bias=None, causal=False, **options):
    """Masks and biases keep their rows; causal becomes a mask."""
    if mask is not None:
        mask = checks.boolean_mask(mask, (*np.shape(mask)[:-2], n, m))[..., rows, :]
    if checks.flag("causal", causal):
        past = np.arange(m) <= np.asarray(rows)[:, None] + (m - n)
        mask = past if mask is None else mask & past
    if bias is not None:
        checks.fits("bias", np.asarray(bias), (*np.shape(bias)[:-2], n, m))
        bias = np.broadcast_to(bias, (*np.shape(bias)[:-2], n, m))[..., rows, :]
    return softmax_attention, softmax_attention_vjp, {**options, "mask": mask, "bias": bias}


def _visible(q, k, v, dtype, mask, bias, causal):
    """The checked bias, and which pairs may meet: a bool array spanning (n, m), or None for all."""
    n, m = q.shape[-2], k.shape[-2]
    shape = (*checks.lead(q, k, v), n, m)
    allowed = None
    if mask is not None:
        allowed = checks.boolean_mask(mask, shape)
    if bias is not None:
        bias = checks.real_option("bias", bias, dtype, q.dtype)
        checks.fits("bias", bias, shape)
        finite = np.broadcast_to(bias != -np.inf, np.broadcast_shapes(bias.shape, (n, m)))
        if not finite.all():
            allowed = finite if allowed is None else allowed & finite
    if checks.flag("causal", causal):
        past = np.arange(m) <= np.arange(n)[:, None] + (m - n)
        allowed = past if allowed is None else allowed & past
    return bias, allowed


def _scores(q, k, bias, allowed, scale, softcap):
    """Scores with -inf where nothing may be seen, and the softcap's slope (None without one)."""
    s = checks.scale(scale, q.shape[-1]) * (q @ k.mT)  # (..., n, m)
    slope = None
    if softcap is not None:
        softcap = checks.number("softcap", softcap, positive=True)
        t = np.tanh(s / softcap)
        s, slope = softcap * t, 1 - t * t
    if bias is not None:
        s = s + bias
    return (s if allowed is None else np.where(allowed, s, -np.inf)), slope
