"""Every attention as loops over numbers, written from the papers. Imports nothing of refattn.

The loops run on any kind of number: float, complex (for complex-step derivatives), mpmath.mpf (for
many digits) and ``Counted`` (a number that counts the operations made on it). One head at a time:
q, k, v are lists of rows. ``sees(i, j)`` says whether query i may attend to key j.
"""

import cmath
import math
from functools import singledispatch

import mpmath


class Counted:
    """A float that counts each multiplication, addition, comparison, ... made on its kind."""

    flops = 0

    def __init__(self, value):
        self.value = float(value)

    @property
    def real(self):
        return self

    def _new(self, value):
        Counted.flops += 1
        return Counted(value)

    def __add__(self, other):
        return self._new(self.value + plain(other))

    def __sub__(self, other):
        return self._new(self.value - plain(other))

    def __mul__(self, other):
        return self._new(self.value * plain(other))

    def __truediv__(self, other):
        return self._new(self.value / plain(other))

    def __gt__(self, other):
        Counted.flops += 1
        return self.value > plain(other)


def plain(x):
    return x.value if isinstance(x, Counted) else x


def elementary(name):
    """exp, log or tanh for each kind of number."""

    @singledispatch
    def function(x):
        return getattr(math, name)(x)

    function.register(complex, getattr(cmath, name))
    function.register(mpmath.mpf, getattr(mpmath, name))
    function.register(Counted, lambda x: x._new(function(x.value)))
    return function


exp, tanh, positive_log = elementary("exp"), elementary("tanh"), elementary("log")


def log(x):
    if isinstance(x, Counted) and x.value == 0:
        return x._new(-math.inf)
    return -math.inf if x == 0 else positive_log(x)


def dot(a, b, zero):
    total = zero
    for x, y in zip(a, b, strict=True):
        total = total + x * y
    return total


def number_like(x):
    """The zero of x's kind of number."""
    return type(x)(0)


def softmax_row(q_i, keys, scale, bias=None, softcap=None):
    """Weights {j: P_ij} over ``keys`` {j: k_j}, the maximum and the sum. bias {j: number}."""
    zero = number_like(q_i[0])
    scores = {}
    for j, k_j in keys.items():
        s = dot(q_i, k_j, zero) * scale
        if softcap is not None:
            s = tanh(s / softcap) * softcap
        if bias is not None:
            s = s + bias[j]
        scores[j] = s
    top = number_like(q_i[0]) if not scores else None
    for s in scores.values():
        # the first score is compared too, with minus infinity
        if s.real > (-math.inf if top is None else top.real):
            top = s
    weights, total = {}, zero
    for j, s in scores.items():
        weights[j] = exp(s - top)
        total = total + weights[j]
    return {j: w / total for j, w in weights.items()}, top, total


def attend(q, k, v, sees, scale, bias=None, softcap=None, return_lse=False):
    """y_i = sum_j P_ij v_j over the keys that query i sees."""
    zero = number_like(q[0][0]) if q else 0
    y, lse = [], []
    for i, q_i in enumerate(q):
        keys = {j: k_j for j, k_j in enumerate(k) if sees(i, j)}
        row_bias = None if bias is None else bias[i]
        weights, top, total = softmax_row(q_i, keys, scale, row_bias, softcap)
        row = [zero] * len(v[0]) if v else []
        for j, p in weights.items():
            for c, x in enumerate(v[j]):
                row[c] = row[c] + p * x
        y.append(row)
        if return_lse:
            lse.append(log(total) + top)
    return (y, lse) if return_lse else y


# Who sees whom: written from the contract and the papers.


def causal_sees(i, j, n, m):
    return j <= i + (m - n)


def window_sees(i, j, n, m, window, causal=False, dilation=1):
    left, right = window if isinstance(window, tuple) else (window, window)
    if causal:
        right = 0
    return any(j == i + (m - n) + t * dilation for t in range(-left, right + 1))


def hierarchical_sees(i, j, n, b):
    levels = 1
    while b**levels < n:
        levels += 1
    for level in range(levels):
        same_block = i // b ** (level + 1) == j // b ** (level + 1)
        if same_block and (j + 1) % b**level == 0:
            return True
    return False


def strided_sees(i, j, stride, causal):
    return (abs(i - j) <= stride or (i - j) % stride == 0) and (j <= i or not causal)


def fixed_sees(i, j, block, summary, causal):
    return (i // block == j // block or j % block >= block - summary) and (j <= i or not causal)


# The attentions.


def softmax_attention(
    q, k, v, *, mask=None, bias=None, causal=False, scale=None, softcap=None, return_lse=False
):
    n, m = len(q), len(k)

    def sees(i, j):
        return (
            (mask is None or mask[i][j])
            and (bias is None or plain(bias[i][j]).real != -math.inf)
            and (not causal or causal_sees(i, j, n, m))
        )

    scale = len(q[0]) ** -0.5 if scale is None else scale
    return attend(q, k, v, sees, scale, bias, softcap, return_lse)


def local_attention(q, k, v, *, window, causal=False, dilation=1, scale=None):
    n, m = len(q), len(k)
    scale = len(q[0]) ** -0.5 if scale is None else scale
    return attend(q, k, v, lambda i, j: window_sees(i, j, n, m, window, causal, dilation), scale)


def sparse_attention(q, k, v, *, mask, scale=None):
    """mask: rows of booleans."""
    scale = len(q[0]) ** -0.5 if scale is None else scale
    return attend(q, k, v, lambda i, j: mask[i][j], scale)
