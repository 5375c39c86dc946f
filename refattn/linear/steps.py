"""The same linear attention in its other forms, for reading: parallel and recurrent."""

import numpy as np

from refattn.linear.core import divide
from refattn.linear.feature_maps import feature_map_of
from refattn.linear.formula import linear_attention_step


def parallel(q, k, v, *, feature_map="elu", causal=False):
    r"""All weights at once, as softmax attention would: O(n m), the factorisation not used.

    .. math:: y = \frac{A v}{A 1}, \qquad A_{ij} = \phi(q_i) \cdot \phi(k_j) \;(j \le i)

    >>> import numpy as np
    >>> parallel(np.zeros((1, 1)), np.zeros((2, 1)), np.array([[1.0], [3.0]]))
    array([[2.]])
    """
    feature_map = feature_map_of(feature_map)
    a = feature_map.query(q) @ feature_map.key(k).mT  # (..., n, m)
    if causal:
        a = np.tril(a)
    return divide(a @ v, a.sum(axis=-1, keepdims=True))


def recurrent(q, k, v, *, feature_map="elu"):
    """One token after another through ``linear_attention_step``, as in decoding.

    >>> import numpy as np
    >>> recurrent(np.zeros((2, 1)), np.zeros((2, 1)), np.array([[1.0], [3.0]])).T
    array([[1., 2.]])
    """
    state, ys = None, []
    for i in range(q.shape[-2]):
        token = q[..., i, :], k[..., i, :], v[..., i, :]
        y, state = linear_attention_step(state, *token, feature_map=feature_map)
        ys.append(y)
    return np.stack(ys, axis=-2)
