"""Linformer (12.3.2): softmax attention on r mixtures of the m keys, O(n r) in place of O(n m)."""

import numpy as np

from refattn import checks
from refattn.arrays import gradients, sum_to_shape
from refattn.cost import Cost, qkvy_bytes, softmax_flops, working_size
from refattn.dispatch import backends, rows_of
from refattn.softmax.formula import softmax_attention, softmax_attention_vjp


@backends
@np.errstate(invalid="ignore", over="ignore")  # where keys hold NaN or infinities: no news
def linformer_attention(q, k, v, *, E, F=None, key_mask=None, scale=None):
    r"""Softmax attention on keys and values that are first projected along the sequence.

    .. math:: Y = \mathrm{softmax}\big(\mathrm{scale}\; Q (E K)^T\big)\, (F V)

    Row t of E K is a mixture of all keys with the weights E_t; the softmax is over the r mixtures.

    Parameters
    ----------
    q : array (..., n, d)
    k : array (..., m, d)
    v : array (..., m, e)
        One dtype for the three; leading axes broadcast.
    E : real array (..., r, m)
        Projects the keys; its leading axes broadcast to those of q, k and v. Cast to q's dtype.
        ``refattn.linformer.projections`` makes some.
    F : real array (..., r, m), optional
        Projects the values; E if None.
    key_mask : bool array broadcasting to (..., m), optional
        False keeps a key and its value out of E K and F V.
    scale : float, optional
        1/sqrt(d) if None.
    backend : {"numpy", "numba", "cuda"}

    Returns
    -------
    y : array (..., n, e)
        Without visible keys, y = 0.

    Raises
    ------
    TypeError
        As ``softmax_attention``; an E or F that is not real floating point, a key_mask that is not
        boolean.
    ValueError
        As ``softmax_attention``; an E, F or key_mask whose shape does not fit, or r = 0.
    BackendUnavailable
        The backend's code, library or driver is missing.

    Notes
    -----
    Cost: about 2 r (n + m) (d + e) FLOPs, and workspace for the r (d + e) numbers of E K and F V
    and for n r scores (``linformer_attention_cost``). Linear in n and m at fixed r.

    Error: within eps * (2 (d + m + 4) A + r + m + 8) * B of the formula on the inputs as they
    come, where A = 1 + the largest scale * sum_c |q_ic| sum_j |E_tj k_jc| and B is the largest
    sum_j |F_tj v_jc|. Tested against 40 digits in tests/test_formulas.py.
    Measured worst, on refattn.verify.certain.hard: 6.5e-10 max|v| (projections that cancel).

    The weights on v, softmax(...) F, may be negative and need not sum to 1. Every row of E K holds
    keys from everywhere, so there is no causal form. E and F fix m: other lengths need others.

    References
    ----------
    Wang et al. 2020, arXiv:2006.04768, equation 7.

    Examples
    --------
    Two mixtures, the means of the halves; equal scores give the mean of the two:

    >>> import numpy as np
    >>> E = np.array([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
    >>> v = np.array([[1.0], [3.0], [5.0], [7.0]])
    >>> linformer_attention(np.zeros((1, 1)), np.zeros((4, 1)), v, E=E)
    array([[4.]])
    """
    q, k, v, dtype = checks.qkv(q, k, v)
    k, v, E, F, _ = prepared(q, k, v, dtype, E, F, key_mask)
    k_r, v_r = E @ k, F @ v  # (..., r, d), (..., r, e)
    return softmax_attention(q, k_r, v_r, scale=scale).astype(dtype, copy=False)


@backends
@np.errstate(invalid="ignore", over="ignore")
def linformer_attention_vjp(dy, q, k, v, *, E, F=None, key_mask=None, scale=None):
    r"""Gradient of ``linformer_attention``: from dy (..., n, e) to (dq, dk, dv, dE), and dF.

    With K_r = E K, V_r = F V and their gradients from ``softmax_attention_vjp``,

    .. math:: dK = E^T dK_r, \quad dE = dK_r K^T, \quad dV = F^T dV_r, \quad dF = dV_r V^T

    Parameters
    ----------
    dy : array (..., n, e)
        Gradient of a scalar with respect to y.
    q, k, v, E, F, key_mask, scale, backend
        As in the forward.

    Returns
    -------
    tuple of arrays
        dq, dk, dv, dE and, where an F came in, dF; without one, dE is the sum of both. Each in the
        shape of its input, in q's dtype. Zero at hidden keys.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As the forward; ValueError for a dy that has not the shape of y.

    Examples
    --------
    One mixture takes all the weight, so the values get E's weights and the keys nothing:

    >>> import numpy as np
    >>> E, two = np.array([[0.25, 0.75]]), np.ones((2, 1))
    >>> dq, dk, dv, dE = linformer_attention_vjp(np.ones((1, 1)), two[:1], two, two, E=E)
    >>> dk.T, dv.T
    (array([[0., 0.]]), array([[0.25, 0.75]]))
    """
    q, k, v, dtype = checks.qkv(q, k, v)
    shape = (*checks.lead(q, k, v), q.shape[-2], v.shape[-1])
    dy = checks.cotangent("dy", dy, shape, dtype)
    shapes = [x.shape for x in (k, v)] + [np.shape(E), np.shape(E if F is None else F)]
    shared = F is None
    k, v, E, F, visible = prepared(q, k, v, dtype, E, F, key_mask)
    # y = softmax_attention(q, k_r, v_r)
    dq, dk_r, dv_r = softmax_attention_vjp(dy, q, E @ k, F @ v, scale=scale)
    # k_r, v_r = E @ k, F @ v
    dk, dv = _hide_rows(E.mT @ dk_r, visible), _hide_rows(F.mT @ dv_r, visible)
    dE, dF = _hide_columns(dk_r @ k.mT, visible), _hide_columns(dv_r @ v.mT, visible)
    found, shapes = [dq, dk, dv, dE, dF], [q.shape, *shapes]
    if shared:  # each summed over its own leading axes, which need not be the same
        dE = sum_to_shape(dE, shapes[3]) + sum_to_shape(dF, shapes[3])
        found, shapes = [dq, dk, dv, dE], shapes[:4]
    return gradients(found, shapes, dtype)


def linformer_attention_cost(n, m, d, e, *, r, F=False, key_mask=None, scale=None, itemsize=4):
    """Counted cost of ``linformer_attention`` for one head, by the rule of ``refattn.cost``.

    Parameters
    ----------
    n, m, d, e : int
        Queries, keys, columns of q and k, columns of v.
    r : int
        Rows of E.
    F : bool
        Whether a second projection is read.
    key_mask : int, optional
        Visible keys, where a mask is read; all m if None. ``scale`` costs the same whatever it is.
    itemsize : int
        Bytes of one number.

    Returns
    -------
    Cost

    Examples
    --------
    Four keys become two: 2 * 2 * 4 FLOPs for each of E K and F V, then 1 x 2 pairs.

    >>> linformer_attention_cost(1, 4, 1, 1, r=2).flops == 16 + 16 + 2 * (2 + 1 + 5 + 2)
    True
    """
    n, m, d, e = checks.sizes(n, m, d, e)
    r = checks.whole("r", r, least=1)
    keys = m if key_mask is None else checks.whole("key_mask", key_mask, least=0, most=m)
    flops = 2 * r * keys * (d + e) + softmax_flops(n * r, d, e)
    moved = qkvy_bytes(n, m, d, e, itemsize) + itemsize * r * m * (2 if checks.flag("F", F) else 1)
    moved += 0 if key_mask is None else m
    return Cost(flops, moved, working_size(itemsize) * (r * (d + e) + n * r))


@rows_of(linformer_attention)
def _rows(rows, n, m, **options):
    """Queries are independent of each other."""
    return linformer_attention, linformer_attention_vjp, options


def prepared(q, k, v, dtype, E, F, key_mask):
    """k, v, E and F for the arithmetic, zero at hidden keys; and the mask of keys, or None."""
    m, lead = k.shape[-2], checks.lead(q, k, v)
    E = _projection("E", E, m, lead, dtype, q.dtype)
    F = E if F is None else _projection("F", F, m, lead, dtype, q.dtype)
    if E.shape[-2] != F.shape[-2]:
        raise ValueError(f"E has {E.shape[-2]} rows, F has {F.shape[-2]}: they must agree")
    if key_mask is None:
        return k, v, E, F, None
    visible = checks.key_mask(key_mask, (*lead, m))
    k, v = _hide_rows(k, visible), _hide_rows(v, visible)
    return k, v, _hide_columns(E, visible), _hide_columns(F, visible), visible


def _projection(name, x, m, lead, dtype, compute):
    """A projection (..., r, m), rounded to q's dtype, in the dtype of the arithmetic."""
    x = checks.real_option(name, x, dtype, compute)
    if x.ndim < 2 or x.shape[-1] != m:
        raise ValueError(f"{name} has shape {x.shape}; expected (..., r, m) with m = {m} keys")
    if x.shape[-2] < 1:
        raise ValueError(f"{name} has 0 rows; expected r >= 1")
    checks.fits(name, x, (*lead, *x.shape[-2:]))
    return x


def _hide_rows(x, visible):
    """(..., m, c) with zeros at hidden keys: a product with 0 would keep their NaN."""
    return x if visible is None else np.where(visible[..., None], x, 0)


def _hide_columns(x, visible):
    """(..., r, m) with zeros at hidden keys."""
    return x if visible is None else np.where(visible[..., None, :], x, 0)
