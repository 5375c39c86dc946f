"""Mistakes in a backward pass whose forward pass is right.

``output(vjp, dy, q, k, v, options)`` gives (dq, dk, dv); ``vjp`` is the right one.
"""

import numpy as np

import refattn
from refattn.linear.core import divide
from refattn.linear.feature_maps import feature_map_of
from refattn.verify.mistakes.base import ALL, LINEAR, SCALED, SOFTMAX, Mistake, scale_of
from refattn.verify.mistakes.of_softmax import weights


def _softmax_parts(q, k, v, dy, options):
    """P, dP, and the softcap's slope, of a softmax attention."""
    s, seen = weights(q, k, options)
    a = np.where(seen, np.exp(s - s.max(axis=1, keepdims=True, initial=-1e300)), 0)
    total = a.sum(axis=1, keepdims=True)
    p = a / np.where(total == 0, 1, total)
    cap, slope = options.get("softcap"), 1.0
    if cap:
        slope = 1 - np.tanh(scale_of(q, options) * (q @ k.mT) / cap) ** 2
    return p, dy @ v.mT, slope


def _no_row_sum(vjp, dy, q, k, v, options):
    """dS = P dP, without - P sum P dP."""
    p, dp, slope = _softmax_parts(q, k, v, dy, options)
    ds = scale_of(q, options) * p * dp * slope
    return ds @ k, ds.T @ q, p.T @ dy


def _no_slope(vjp, dy, q, k, v, options):
    if not options.get("softcap"):
        return None
    p, dp, _ = _softmax_parts(q, k, v, dy, options)
    ds = scale_of(q, options) * p * (dp - (p * dp).sum(axis=1, keepdims=True))
    return ds @ k, ds.T @ q, p.T @ dy


def _weights_not_transposed(vjp, dy, q, k, v, options):
    if len(q) != len(k):
        return None
    p, *_ = _softmax_parts(q, k, v, dy, options)
    dq, dk, _ = vjp(dy, q, k, v, **options)[:3]
    return dq, dk, p @ dy


def _scaled_by(power):
    def output(vjp, dy, q, k, v, options):
        factor = scale_of(q, options) ** power
        if factor == 1:
            return None
        dq, dk, dv = vjp(dy, q, k, v, **options)[:3]
        return factor * dq, factor * dk, dv

    return output


def _detached(vjp, dy, q, k, v, options):
    dq, dk, dv = vjp(dy, q, k, v, **options)[:3]
    return 0 * dq, 0 * dk, dv


def _exchanged(vjp, dy, q, k, v, options):
    dq, dk, dv = vjp(dy, q, k, v, **options)[:3]
    return (dk, dq, dv) if dq.shape == dk.shape else None


def _gate_left_out(vjp, dy, q, k, v, options):
    """The gradient of the ungated attention."""
    rest = {name: x for name, x in options.items() if name not in ("gate", "attention")}
    return refattn.softmax_attention_vjp(dy, q, k, v, **rest)[:3]


def _sums(phi_q, phi_k, v, dy, causal):
    """A = phi_q phi_k^T of the visible pairs, and dy / den."""
    a = phi_q @ phi_k.mT
    a = np.tril(a) if causal else a
    den = a.sum(axis=1, keepdims=True)
    return a, divide(dy, den), divide(a @ v, den)


def _linear(normaliser=True, slope=True, forwards=False):
    """The gradient of linear attention from all pairs, with one of its parts gone wrong."""

    def output(vjp, dy, q, k, v, options):
        causal = options.get("causal", False)
        if options.get("key_mask") is not None or options.get("initial_state") is not None:
            return None
        if not options.get("normalize", True) or (forwards and not causal):
            return None
        phi = feature_map_of(options.get("feature_map", "elu"))
        phi_q, phi_k = phi.query(q), phi.key(k)
        if not slope and phi_q.shape != q.shape:
            return None
        a, dnum, y = _sums(phi_q, phi_k, v, dy, causal)
        da = dnum @ v.mT  # num = A @ v
        if normaliser:
            da = da - (dnum * y).sum(axis=1, keepdims=True)  # den = A @ 1
        to_keys, weights = da, a
        if causal:
            da = np.tril(da)
            to_keys = np.triu(to_keys) if forwards else da
            weights = np.triu(phi_q @ phi_k.mT) if forwards else a
        dphi_q, dphi_k, dv = da @ phi_k, to_keys.T @ phi_q, weights.T @ dnum
        if not slope:
            return dphi_q, dphi_k, dv
        return phi.query_vjp(dphi_q, q), phi.key_vjp(dphi_k, k), dv

    return output


MISTAKES = [
    Mistake(
        "gradient without the normaliser path",
        "dS = P dP, without - P (the row's sum of P dP)",
        SOFTMAX,
        _no_row_sum,
    ),
    Mistake(
        "gradient without the normaliser path",
        "the denominator phi(q) . z is taken for a constant",
        LINEAR,
        _linear(normaliser=False),
    ),
    Mistake(
        "gradient without the feature map's slope",
        "dphi(q) and dphi(k) are handed on as dq and dk",
        LINEAR,
        _linear(slope=False),
    ),
    Mistake(
        "backward sums run forwards",
        "dk and dv gather the queries up to a key, not those from it on",
        LINEAR,
        _linear(forwards=True),
    ),
    Mistake(
        "gradient without the softcap's slope",
        "ds is not multiplied by 1 - tanh^2",
        ("softmax_attention",),
        _no_slope,
    ),
    Mistake(
        "weights not transposed",
        "dv is P dy, not P^T dy",
        SOFTMAX,
        _weights_not_transposed,
    ),
    Mistake("gradient unscaled", "dq and dk lack the scale", SCALED, _scaled_by(-1)),
    Mistake("gradient scaled twice", "dq and dk have the scale twice", SCALED, _scaled_by(1)),
    Mistake("weights detached", "dq and dk are 0: only v gets a gradient", ALL, _detached),
    Mistake("dq and dk exchanged", "each is given in the other's place", ALL, _exchanged),
    Mistake(
        "gate left out of the gradient",
        "dy is not multiplied by the gate on its way back",
        ("gated_attention",),
        _gate_left_out,
    ),
]
