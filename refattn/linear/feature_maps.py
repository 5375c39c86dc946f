"""Feature maps: functions of one row of q or k whose inner product stands in for exp(q . k)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refattn.softmax.merge import row_softmax


@dataclass(frozen=True)
class FeatureMap:
    """phi(q) and phi(k) of linear attention, with their gradients.

    Parameters
    ----------
    query, key : callable
        (..., n, d) to (..., n, r), evaluated in NumPy ahead of any kernel.
    query_vjp, key_vjp : callable, optional
        ``(dphi, x) -> dx``: from the gradient of the features to that of the rows. Only the
        attention's ``_vjp`` needs them.
    width : callable, optional
        d -> r, so that costs need not be told r.
    flops : callable, optional
        d -> FLOPs that one row of q and one row of k take, a pair; not counted if None.
    hidden : float
        What a key that nobody may see is set to before the map; its features are then set to 0.
    causal : bool
        False for a map whose features of one key depend on other keys.

    Examples
    --------
    The chapter's Q f(K) V, with q as it is and f = exp:

    >>> exponential = FeatureMap(query=identity, key=np.exp)
    >>> exponential.key(np.zeros((1, 2)))
    array([[1., 1.]])
    """

    query: Callable
    key: Callable
    query_vjp: Callable | None = None
    key_vjp: Callable | None = None
    width: Callable | None = None
    flops: Callable | None = None
    hidden: float = 0.0
    causal: bool = True


def identity(x):
    """phi(x) = x."""
    return x


def identity_vjp(dphi, x):
    """The gradient of the identity."""
    return dphi


def elu(x):
    """elu(x) + 1: x + 1 above zero, exp(x) below. Katharopoulos et al. 2020, equation 7."""
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def elu_vjp(dphi, x):
    """From d(elu + 1) to dx."""
    return dphi * np.where(x > 0, 1, np.exp(np.minimum(x, 0)))


def relu(x):
    """max(x, 0)."""
    return np.maximum(x, 0)


def relu_vjp(dphi, x):
    """From d relu to dx; the slope at 0 is 0."""
    return np.where(x > 0, dphi, 0)


def _softmax(x, axis):
    """Softmax along an axis; zeros where all of it is hidden."""
    return np.moveaxis(row_softmax(np.moveaxis(x, axis, -1))[0], -1, axis)


def softmax_over_features(x):
    """Softmax of each query over its d features. Shen et al. 2018, arXiv:1812.01243."""
    return _softmax(x, -1)


def softmax_over_features_vjp(dphi, x):
    """From the gradient of a softmax over the last axis to dx."""
    p = _softmax(x, -1)
    return p * (dphi - (p * dphi).sum(axis=-1, keepdims=True))


def softmax_over_positions(x):
    """Softmax of each feature over all keys, so that a feature is a weighted mean of keys."""
    return _softmax(x, -2)


def softmax_over_positions_vjp(dphi, x):
    """From the gradient of a softmax over the rows to dx."""
    p = _softmax(x, -2)
    return p * (dphi - (p * dphi).sum(axis=-2, keepdims=True))


def taylor(x):
    """Features of 1 + t + t^2 / 2, the start of exp(t), at t = q . k.

    1, the x_c, the x_c^2 / sqrt(2) and the x_b x_c of b < c: r = 1 + d + d (d + 1) / 2.
    """
    b, c = np.triu_indices(x.shape[-1])
    squares = _taylor_weights(x, b, c) * x[..., b] * x[..., c]
    return np.concatenate([np.ones_like(x[..., :1]), x, squares], axis=-1)


def taylor_vjp(dphi, x):
    """From the gradient of the features of ``taylor`` to dx."""
    d = x.shape[-1]
    b, c = np.triu_indices(d)
    pairs = np.zeros((*x.shape, d), x.dtype)
    pairs[..., b, c] = _taylor_weights(x, b, c) * dphi[..., 1 + d :]
    return dphi[..., 1 : 1 + d] + ((pairs + pairs.mT) @ x[..., None])[..., 0]


def _taylor_weights(x, b, c):
    return np.where(b == c, 0.5**0.5, 1).astype(x.dtype)


FEATURE_MAPS = {
    "elu": FeatureMap(
        elu, elu, elu_vjp, elu_vjp, width=lambda d: d, flops=lambda d: (2 * d, 2 * d)
    ),
    "relu": FeatureMap(relu, relu, relu_vjp, relu_vjp, width=lambda d: d, flops=lambda d: (d, d)),
    "softmax": FeatureMap(
        softmax_over_features,
        softmax_over_positions,
        softmax_over_features_vjp,
        softmax_over_positions_vjp,
        width=lambda d: d,
        flops=lambda d: (5 * d, 5 * d),
        hidden=-np.inf,
        causal=False,
    ),
    "taylor": FeatureMap(
        taylor,
        taylor,
        taylor_vjp,
        taylor_vjp,
        width=lambda d: 1 + d + d * (d + 1) // 2,
        flops=lambda d: (d * (d + 1) // 2 + d,) * 2,
    ),
}


def feature_map_of(value):
    """A FeatureMap from its name, or as it is."""
    if isinstance(value, FeatureMap):
        return value
    if not isinstance(value, str) or value not in FEATURE_MAPS:
        names = ", ".join(map(repr, FEATURE_MAPS))
        raise ValueError(f"feature_map is {value!r}; expected a FeatureMap or one of {names}")
    return FEATURE_MAPS[value]
