"""Array steps that more than one mechanism uses."""

import numpy as np

from refattn import checks


def masked_matmul(a, b, allowed):
    """``a @ b``, but row i of a meets only the rows j of b that ``allowed[i, j]`` names.

    a is zero where nothing is allowed, yet 0 * nan is nan: without this, one NaN in a hidden key
    would reach every query. ``allowed`` None means that all pairs meet.
    """
    bad = None if allowed is None else ~np.isfinite(b)
    if bad is None or not bad.any():
        return a @ b
    y = a @ np.where(bad, 0, b)
    rest = np.where(bad, b, 0)
    for j in np.flatnonzero(bad.any(axis=-1).reshape(-1, b.shape[-2]).any(axis=0)):
        with np.errstate(invalid="ignore"):  # 0 * inf where j is hidden
            term = a[..., :, j, None] * rest[..., None, j, :]  # (..., n, e)
        y = y + np.where(allowed[..., :, j, None], term, 0)
    return y


def sum_to_shape(x, shape):
    """Sum ``x`` over the axes that broadcasting added to or stretched from ``shape``."""
    if x.shape == tuple(shape):
        return x  # a sum over no axis would copy it
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    stretched = tuple(axis for axis, size in enumerate(shape) if size == 1 != x.shape[axis])
    return x.sum(axis=stretched, keepdims=True) if stretched else x


def gradients(found, shapes, dtype):
    """Gradients as they are handed out: in their inputs' shapes, rounded to q's dtype."""
    pairs = zip(found, shapes, strict=True)
    return tuple(sum_to_shape(g, shape).astype(dtype, copy=False) for g, shape in pairs)


def attention_matrix(attention, q, k, /, **options):
    r"""The weights A of an attention: the matrix with ``y = A @ v``.

    .. math:: A = \mathrm{attention}(q, k, I_m)

    An attention that is linear in its values gives its weights when the values are the identity.

    Parameters
    ----------
    attention : callable ``attention(q, k, v, **options)``
    q : array (..., n, d)
    k : array (..., m, d)
    **options
        Passed on to ``attention``; ``return_lse`` and ``return_state`` make no sense here.

    Returns
    -------
    array (..., n, m)
        In q's dtype.

    Raises
    ------
    TypeError, ValueError
        As ``attention`` does; ValueError for ``return_lse`` or ``return_state``.

    Notes
    -----
    It costs what the attention costs with e = m, so O(n m) memory even for a linear form: it is
    for looking, not for computing. Where the output is not linear in v, as with an
    ``initial_state`` or a pool or fuse of "max", there is no such matrix.

    Examples
    --------
    >>> import numpy as np, refattn
    >>> refattn.attention_matrix(refattn.softmax_attention, np.zeros((1, 2)), np.zeros((4, 2)))
    array([[0.25, 0.25, 0.25, 0.25]])
    """
    for name in ("return_lse", "return_state"):
        if options.get(name):
            raise ValueError(f"{name}=True came; attention_matrix returns the weights alone")
    k = checks.floating("k", k)
    if k.ndim < 2:
        raise ValueError(f"k has shape {k.shape}; expected (..., m, d)")
    return attention(q, k, np.eye(k.shape[-2], dtype=k.dtype), **options)
