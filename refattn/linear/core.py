"""Attention over features: what linear attention and Performer have in common.

phi_q (..., n, r) and phi_k (..., m, r) come ready made; a state is S (..., r, e), the sum of
phi_k v^T, and z (..., r), the sum of phi_k. ``decay`` (..., n, r) multiplies the state ahead of
each position: Performer uses it to move its stabiliser, linear attention has none.
"""

import numpy as np


def divide(num, den):
    """num / den, and 0 where den is 0."""
    zero = den == 0
    return np.where(zero, 0, num / np.where(zero, 1, den))


def full(phi_q, phi_k, v, state, normalize):
    """Every query over every key: y, and the state after all keys."""
    S, z = _sums(phi_k, v, state)
    num = phi_q @ S  # (..., n, e)
    return (divide(num, phi_q @ z[..., None]) if normalize else num), (S, z)


def full_vjp(dy, phi_q, phi_k, v, state, normalize, dstate):
    """dphi_q, dphi_k, dv and the gradient of the state that came in."""
    S, z = _sums(phi_k, v, state)
    num, den = phi_q @ S, phi_q @ z[..., None]
    dnum, dden = quotient_vjp(dy, num, den, normalize)
    # num = phi_q @ S, den = phi_q @ z
    dphi_q = dnum @ S.mT + dden * z[..., None, :]  # (..., n, r)
    dS = phi_q.mT @ dnum + dstate[0]  # (..., r, e)
    dz = (phi_q * dden).sum(axis=-2) + dstate[1]  # (..., r)
    # S = phi_k.T @ v, z = phi_k summed
    return dphi_q, v @ dS.mT + dz[..., None, :], phi_k @ dS, (dS, dz)


def causal(phi_q, phi_k, v, state, normalize, decay=None, rows=None):
    """Query i over keys j <= i, one position at a time: y, and the state after all keys.

    ``rows`` are the positions that the queries stand at, in order; all of them if None.
    """
    S, z = state
    ys = []
    for i, at in _positions(v.shape[-2], rows):
        S, z = _advance(S, z, phi_k, v, decay, i)
        if at is not None:
            phi = phi_q[..., at, :]
            num = (phi[..., None, :] @ S)[..., 0, :]  # (..., e)
            ys.append(divide(num, _dot(phi, z)) if normalize else num)
    lead = np.broadcast_shapes(*(x.shape[:-2] for x in (phi_q, phi_k, v, S)))
    y = np.stack(ys, axis=-2) if ys else np.zeros((*lead, 0, v.shape[-1]), v.dtype)
    return y, (S, z)


def causal_vjp(dy, phi_q, phi_k, v, state, normalize, dstate, decay=None, rows=None):
    """dphi_q, dphi_k, dv and the gradient of the state that came in.

    Once forward, since dphi_q needs the state at its position; once backward, where R and u gather
    what later queries send to a key. No state is kept.
    """
    S, z = state
    lead = np.broadcast_shapes(dy.shape[:-2], S.shape[:-2], phi_k.shape[:-2], v.shape[:-2])
    dphi_q = np.zeros((*lead, *phi_q.shape[-2:]), v.dtype)
    dnum = np.zeros((*lead, *dy.shape[-2:]), v.dtype)
    dden = np.zeros((*dnum.shape[:-1], 1), v.dtype)
    for i, at in _positions(v.shape[-2], rows):
        S, z = _advance(S, z, phi_k, v, decay, i)
        if at is not None:
            phi = phi_q[..., at, :]
            num = (phi[..., None, :] @ S)[..., 0, :]
            dnum[..., at, :], dden[..., at, :] = quotient_vjp(
                dy[..., at, :], num, _dot(phi, z), normalize
            )
            # num = phi @ S, den = phi @ z
            dphi_q[..., at, :] = (S @ dnum[..., at, :, None])[..., 0] + z * dden[..., at, :]

    dphi_k = np.zeros((*lead, *phi_k.shape[-2:]), v.dtype)
    dv = np.zeros((*lead, *v.shape[-2:]), v.dtype)
    R = np.broadcast_to(dstate[0], (*lead, *dstate[0].shape[-2:]))  # (..., r, e)
    u = np.broadcast_to(dstate[1], (*lead, *dstate[1].shape[-1:]))  # (..., r)
    for i, at in reversed(_positions(v.shape[-2], rows)):
        if at is not None:
            phi = phi_q[..., at, :]
            R = R + phi[..., None] * dnum[..., at, None, :]
            u = u + phi * dden[..., at, :]
        # S' = decay S + phi_k v^T, z' = decay z + phi_k
        dphi_k[..., i, :] = (R @ v[..., i, :, None])[..., 0] + u
        dv[..., i, :] = (phi_k[..., i, None, :] @ R)[..., 0, :]
        if decay is not None:
            R, u = decay[..., i, :, None] * R, decay[..., i, :] * u
    return dphi_q, dphi_k, dv, (R, u)


def _sums(phi_k, v, state):
    return phi_k.mT @ v + state[0], phi_k.sum(axis=-2) + state[1]


def _dot(phi, z):
    return (phi * z).sum(axis=-1, keepdims=True)


def _advance(S, z, phi_k, v, decay, i):
    """The state with key i in it."""
    if decay is not None:
        S, z = decay[..., i, :, None] * S, decay[..., i, :] * z
    return S + phi_k[..., i, :, None] * v[..., i, None, :], z + phi_k[..., i, :]


def quotient_vjp(dy, num, den, normalize):
    """dnum and dden of y = num / den; 0 where den is 0; dden 0 if there is no division."""
    if not normalize:
        return dy, np.zeros((*dy.shape[:-1], 1), dy.dtype)
    dnum = divide(dy, den)
    return dnum, -(dnum * divide(num, den)).sum(axis=-1, keepdims=True)


def _positions(n, rows):
    """(position, index of its query or None), in order."""
    if rows is None:
        return [(i, i) for i in range(n)]
    index = {int(position): at for at, position in enumerate(rows)}
    return [(i, index.get(i)) for i in range(n)]
