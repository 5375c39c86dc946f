"""The named feature maps whose features are made ahead of the CUDA kernels, for any library's
arrays: "softmax" and "taylor" of ``refattn.linear.feature_maps``, by array operations."""

import functools
import math

import numpy as np

from refattn import gpu
from refattn.linear.feature_maps import FEATURE_MAPS, FeatureMap


def map_for(xp, feature_map):
    """The map for arrays of this library; TypeError for callables that are NumPy's."""
    if xp is np:
        return feature_map
    if feature_map is FEATURE_MAPS["softmax"]:
        over = [functools.partial(softmax, xp, axis=axis) for axis in (-1, -2)]
        back = [functools.partial(softmax_vjp, xp, axis=axis) for axis in (-1, -2)]
        return FeatureMap(*over, *back, hidden=-math.inf, causal=False)
    if feature_map is FEATURE_MAPS["taylor"]:
        both, back = functools.partial(taylor, xp), functools.partial(taylor_vjp, xp)
        return FeatureMap(both, both, back, back)
    names = ", ".join(map(repr, FEATURE_MAPS))
    raise TypeError(
        "the feature map's callables take NumPy arrays, and q came from "
        f"{xp.__name__.rsplit('.', 1)[-1]}; expected NumPy arrays, or one of {names}"
    )


def softmax(xp, x, axis):
    """Softmax along an axis; zeros where all of it is hidden."""
    if not math.prod(x.shape):
        return x
    top = xp.max(x, axis=axis, keepdims=True)
    top = xp.where(top == -math.inf, xp.zeros_like(top), top)
    p = xp.exp(x - top)
    total = xp.sum(p, axis=axis, keepdims=True)
    return p / xp.where(total == 0, xp.ones_like(total), total)


def softmax_vjp(xp, dphi, x, axis):
    p = softmax(xp, x, axis)
    return p * (dphi - xp.sum(p * dphi, axis=axis, keepdims=True))


def taylor(xp, x):
    """1, the x_c, the x_c^2 / sqrt(2) and the x_b x_c of b < c."""
    b, c = np.triu_indices(x.shape[-1])
    weights = gpu.like(xp, x, np.where(b == c, 0.5**0.5, 1.0).astype(gpu.dtype_of(x)))
    left, right = (xp.take(x, gpu.like(xp, x, at), axis=-1) for at in (b, c))
    return xp.concat([xp.ones_like(x[..., :1]), x, weights * left * right], axis=-1)


def taylor_vjp(xp, dphi, x):
    """Each x_b has, in dx, the gradient of its pair with x_c times x_c; of its square, twice."""
    d, dtype = x.shape[-1], gpu.dtype_of(x)
    b, c = np.triu_indices(d)
    place, weights = np.zeros((d, d), np.int64), np.ones((d, d))
    place[b, c] = place[c, b] = 1 + d + np.arange(len(b))
    np.fill_diagonal(weights, 2 * 0.5**0.5)
    pairs = xp.take(dphi, gpu.like(xp, x, place.reshape(-1)), axis=-1)
    pairs = xp.reshape(pairs, (*x.shape, d)) * gpu.like(xp, x, weights.astype(dtype))
    return dphi[..., 1 : 1 + d] + xp.sum(pairs * x[..., None, :], axis=-1)
