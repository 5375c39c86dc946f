"""Causal linear attention by chunks: quadratic inside a chunk, a state from chunk to chunk.

Three products of matrices a chunk stand in for one product of vectors a position: the same answer,
in the form that keeps a processor busy.
"""

import numpy as np

from refattn import checks
from refattn.arrays import masked_matmul
from refattn.cost import Cost, working_size
from refattn.dispatch import backends, rows_of
from refattn.linear import core
from refattn.linear.feature_maps import feature_map_of
from refattn.linear.formula import (
    linear_attention,
    linear_attention_cost,
    linear_attention_vjp,
    some_rows,
)
from refattn.linear.inputs import (
    cost_up_to_last,
    cotangents,
    features_of,
    of_every_head,
    prepare,
    pull_back,
)


@backends
@np.errstate(invalid="ignore", over="ignore")
def linear_attention_chunked(
    q,
    k,
    v,
    *,
    feature_map="elu",
    causal=True,
    normalize=True,
    key_mask=None,
    initial_state=None,
    return_state=False,
    chunk=64,
):
    r"""``linear_attention`` by chunks of positions; causal unless told otherwise.

    .. math:: num_c = \mathrm{tril}(\Phi_c(Q)\, \Phi_c(K)^T)\, V_c + \Phi_c(Q)\, S_{c-1}, \qquad
              S_c = S_{c-1} + \Phi_c(K)^T V_c

    den likewise with ones for V, and y = num / den.

    Parameters
    ----------
    q, k, v, feature_map, causal, normalize, key_mask, initial_state, return_state, backend
        As in ``linear_attention``.
    chunk : int >= 1
        Positions in a chunk; the last may be short. 1 is the recurrence, n the parallel form.

    Returns
    -------
    y, and state with ``return_state``
        Equal to ``linear_attention``'s to rounding.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As ``linear_attention``; ValueError for chunk < 1.

    Notes
    -----
    Cost: 4 r e FLOPs a position for the state, as in the recurrence, and (r + e) (chunk + 1) for
    the pairs inside the chunk.

    Error: as ``linear_attention``. A NaN at a later position of the same chunk stays there.
    Measured worst, on refattn.verify.certain.hard: 3.4e-12 max|v|
    (a state that takes 0.999 of the denominator).

    References
    ----------
    Hua et al. 2022, arXiv:2202.10447, section 3; Yang et al. 2023, arXiv:2312.06635, section 2.2.

    Examples
    --------
    >>> import numpy as np
    >>> v = np.array([[2.0], [4.0], [9.0]])
    >>> linear_attention_chunked(np.zeros((3, 1)), np.zeros((3, 1)), v, chunk=2).T
    array([[2., 3., 5.]])
    """
    checks.flag("return_state", return_state)
    checks.flag("normalize", normalize)
    chunk = checks.whole("chunk", chunk, least=1)
    options = {"feature_map": feature_map, "causal": causal, "key_mask": key_mask}
    if not checks.flag("causal", causal):
        options |= {"normalize": normalize, "initial_state": initial_state}
        return linear_attention(q, k, v, **options, return_state=return_state)
    inputs = prepare(q, k, v, initial_state=initial_state, **options)
    _, _, v, dtype, *_, phi_q, phi_k, (S, z) = inputs
    ys = []
    for c, past in _chunks(v.shape[-2], chunk):
        num, den, _ = _inside(phi_q[..., c, :], phi_k[..., c, :], v[..., c, :], past, S, z)
        ys.append(core.divide(num, den) if normalize else num)
        S, z = _advance(phi_k[..., c, :], v[..., c, :], S, z)
    lead = np.broadcast_shapes(*(x.shape[:-2] for x in (phi_q, phi_k, v, S)))
    y = np.concatenate(ys, axis=-2) if ys else np.zeros((*lead, 0, v.shape[-1]), v.dtype)
    y = y.astype(dtype, copy=False)
    return (y, of_every_head((S, z), lead)) if return_state else y


@backends
@np.errstate(invalid="ignore", over="ignore")
def linear_attention_chunked_vjp(
    dy,
    q,
    k,
    v,
    *,
    feature_map="elu",
    causal=True,
    normalize=True,
    key_mask=None,
    initial_state=None,
    return_state=False,
    chunk=64,
    dstate=None,
):
    """Gradient of ``linear_attention_chunked``, by chunks: once forward for dq, once backward for
    dk and dv.

    Parameters
    ----------
    dy, dstate
        As in ``linear_attention_vjp``.
    q, k, v, feature_map, causal, normalize, key_mask, initial_state, return_state, chunk, backend
        As in the forward.

    Returns
    -------
    tuple
        dq, dk, dv; then (dS, dz), if ``initial_state`` came in.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As ``linear_attention_vjp``; ValueError for chunk < 1.

    Examples
    --------
    >>> import numpy as np
    >>> zero = np.zeros((2, 1))
    >>> linear_attention_chunked_vjp(np.ones((2, 1)), zero, zero, zero)[2].T
    array([[1.5, 0.5]])
    """
    checks.flag("return_state", return_state)
    checks.flag("normalize", normalize)
    chunk = checks.whole("chunk", chunk, least=1)
    options = {"feature_map": feature_map, "causal": causal, "key_mask": key_mask}
    if not checks.flag("causal", causal):
        options |= {"normalize": normalize, "initial_state": initial_state}
        return linear_attention_vjp(dy, q, k, v, **options, dstate=dstate)
    inputs = prepare(q, k, v, initial_state=initial_state, **options)
    dy, dstate = cotangents(dy, dstate, inputs)
    grads = _chunked_vjp(dy, *inputs[-3:-1], inputs[2], inputs[-1], normalize, dstate, chunk)
    return pull_back(grads, inputs, (np.shape(q), np.shape(k), np.shape(v)), initial_state)


def linear_attention_chunked_cost(
    n,
    m,
    d,
    e,
    *,
    feature_map="elu",
    r=None,
    causal=True,
    normalize=True,
    key_mask=None,
    initial_state=False,
    return_state=False,
    chunk=64,
    itemsize=4,
):
    """Counted cost of ``linear_attention_chunked`` for one head, by the rule of ``refattn.cost``.

    Parameters
    ----------
    n, m, d, e, feature_map, r, causal, normalize, initial_state, return_state, itemsize
        As in ``linear_attention_cost``.
    key_mask : int, optional
        Visible keys. Inside a chunk the pairs are counted as if all were visible.
    chunk : int
        Positions in a chunk.

    Returns
    -------
    Cost

    Examples
    --------
    The pairs inside a chunk cost more the longer it is:

    >>> short, long = (linear_attention_chunked_cost(8, 8, 4, 4, chunk=c).flops for c in (1, 8))
    >>> short < long
    True
    """
    options = {"feature_map": feature_map, "r": r, "key_mask": key_mask, "itemsize": itemsize}
    options |= {"normalize": normalize}
    options |= {"initial_state": initial_state, "return_state": return_state}
    rest = linear_attention_cost(n, m, d, e, causal=causal, **options)
    if not causal:
        return rest
    r = features_of(feature_map_of(feature_map), r, d)
    chunk = checks.whole("chunk", chunk, least=1)
    pairs = sum(size * (size + 1) // 2 for size in _sizes(n, chunk))
    flops = pairs * (2 * r + 2 * e + (1 if normalize else 0))  # a, a @ v, row sums of a
    flops += n * (e + (1 if normalize else 0))  # what is inside the chunk plus what is before it
    workspace = rest.workspace + working_size(itemsize) * min(chunk, n) ** 2
    return Cost(rest.flops + flops, rest.bytes, workspace)


def _cost_of_rows(rows, n, m, d, e, *, causal=True, chunk=64, **sizes):
    if len(rows) == n:
        return linear_attention_chunked_cost(n, m, d, e, causal=causal, chunk=chunk, **sizes)
    by_steps = cost_up_to_last(linear_attention_cost)
    return by_steps(rows, n, m, d, e, causal=causal, **sizes)


@rows_of(
    linear_attention_chunked,
    cost=_cost_of_rows,
    by_position=lambda sizes: sizes.get("causal", True),
)
def _some_rows(rows, n, m, *, causal=True, chunk=64, **options):
    """Scattered rows go by the recurrence."""
    checks.whole("chunk", chunk, least=1)
    return some_rows(rows, n, m, causal=causal, **options)


def _sizes(n, chunk):
    return [min(chunk, n - start) for start in range(0, n, chunk)]


def _chunks(n, chunk):
    """Each chunk's slice, and who sees whom inside it."""
    starts = range(0, n, chunk)
    return [
        (slice(start, start + size), np.tri(size, dtype=bool))
        for start, size in zip(starts, _sizes(n, chunk), strict=True)
    ]


def _inside(phi_q, phi_k, v, past, S, z):
    """num and den of one chunk with the state S, z before it, and the weights inside it."""
    a = np.where(past, phi_q @ phi_k.mT, 0)  # (..., c, c)
    num = masked_matmul(a, v, past) + phi_q @ S  # (..., c, e)
    den = a.sum(axis=-1, keepdims=True) + phi_q @ z[..., None]  # (..., c, 1)
    return num, den, a


def _advance(phi_k, v, S, z):
    return S + phi_k.mT @ v, z + phi_k.sum(axis=-2)


def _chunked_vjp(dy, phi_q, phi_k, v, state, normalize, dstate, chunk):
    S, z = state
    lead = dy.shape[:-2]
    dphi_q, dphi_k = (np.zeros((*lead, *x.shape[-2:]), v.dtype) for x in (phi_q, phi_k))
    dv, dnum = (np.zeros((*lead, *x.shape[-2:]), v.dtype) for x in (v, dy))
    dden = np.zeros((*dnum.shape[:-1], 1), v.dtype)
    for c, past in _chunks(v.shape[-2], chunk):
        f, g, x = phi_q[..., c, :], phi_k[..., c, :], v[..., c, :]
        num, den, a = _inside(f, g, x, past, S, z)
        up, down = core.quotient_vjp(dy[..., c, :], num, den, normalize)
        dnum[..., c, :], dden[..., c, :] = up, down
        # num = a @ v + phi_q @ S, den = a summed + phi_q @ z
        da = np.where(past, up @ x.mT + down, 0)
        dphi_q[..., c, :] = masked_matmul(da, g, past) + up @ S.mT + down * z[..., None, :]
        dphi_k[..., c, :] = masked_matmul(da.mT, f, past.T)
        dv[..., c, :] = masked_matmul(a.mT, up, past.T)
        S, z = _advance(g, x, S, z)
    R = np.broadcast_to(dstate[0], (*lead, *dstate[0].shape[-2:]))  # (..., r, e)
    u = np.broadcast_to(dstate[1], (*lead, *dstate[1].shape[-1:]))  # (..., r)
    for c, _ in reversed(_chunks(v.shape[-2], chunk)):
        # S_c = S_(c-1) + phi_k.T @ v
        dphi_k[..., c, :] += v[..., c, :] @ R.mT + u[..., None, :]
        dv[..., c, :] += phi_k[..., c, :] @ R
        R = R + phi_q[..., c, :].mT @ dnum[..., c, :]
        u = u + (phi_q[..., c, :] * dden[..., c, :]).sum(axis=-2)
    return dphi_q, dphi_k, dv, (R, u)
