"""One-number steps of the compiled kernels."""

import math

import numpy as np
from numba import njit
from numba.extending import overload

# What the compiler may do to sums and products. Never "nnan" or "ninf": -inf is how pairs are
# hidden, and NaN must come through.
FASTMATH = {"contract", "reassoc", "nsz", "arcp"}
LOG2E = float(np.log2(np.e))
LN2 = float(np.log(2.0))


def _taylor(degree):
    """2**f = sum_k (f ln 2)^k / k!: its coefficients. On [-1/2, 1/2] what is left out is below
    (ln 2 / 2)^(degree + 1) / (degree + 1)!: 1.2e-7 for degree 6, 4e-18 for degree 13."""
    return [LN2**k / math.factorial(k) for k in range(degree + 1)]


# 2**t below these is taken for 0. One step further down numbers are denormal, and every product
# with one takes a hundred times as long.
LEAST = {"float32": -120.0, "float64": -1000.0}
LOW32, HALF32, ZERO32 = np.float32(LEAST["float32"]), np.float32(0.5), np.float32(0)
LOW64 = LEAST["float64"]
C0, C1, C2, C3, C4, C5, C6 = (np.float32(c) for c in _taylor(6))
D0, D1, D2, D3, D4, D5, D6, D7, D8, D9, D10, D11, D12, D13 = _taylor(13)


def exp2(t):
    r"""2**t for t <= 0; exactly 0 below the least exponent (``LEAST``), -inf included.

    .. math:: 2^t = 2^n\, p(f), \qquad n = \lfloor t + 1/2 \rfloor, \quad f = t - n \in [-1/2, 1/2)

    p is a polynomial, and 2^n is made by writing n into the exponent's bits, so that a loop over
    it becomes vector instructions, which a call of the system's exp does not. NaN stays NaN.

    Here, where nothing is compiled, NumPy's; compiled code gets one of the two below.
    """
    least = LEAST[np.asarray(t).dtype.name]
    return type(t)(0) if t < least else np.exp2(t)


@njit(fastmath=FASTMATH)
def _exp2_32(t):
    low = t if not (t < LOW32) else LOW32  # in this order NaN goes through
    n = np.floor(low + HALF32)
    f = low - n
    p = ((((((C6 * f + C5) * f + C4) * f + C3) * f + C2) * f) + C1) * f + C0
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return ZERO32 if t < LOW32 else p * power


@njit(fastmath=FASTMATH)
def _exp2_64(t):
    low = t if not (t < LOW64) else -1000.0
    n = np.floor(low + 0.5)
    f = low - n
    p = ((((((D13 * f + D12) * f + D11) * f + D10) * f + D9) * f + D8) * f + D7) * f + D6
    p = (((((p * f + D5) * f + D4) * f + D3) * f + D2) * f + D1) * f + D0
    power = np.int64((np.int64(n) + np.int64(1023)) << np.int64(52)).view(np.float64)
    return 0.0 if t < LOW64 else p * power


@overload(exp2)
def _exp2(t):
    if getattr(t, "bitwidth", 64) == 32:
        return lambda t: _exp2_32(t)
    return lambda t: _exp2_64(t)


@njit(fastmath=FASTMATH)
def tanh(x):
    """(1 - u) / (1 + u) with u = exp(-2 |x|), and the sign of x."""
    kind = type(x)
    u = exp2(kind(-2 * LOG2E) * abs(x))
    t = (kind(1) - u) / (kind(1) + u)
    return t if x > 0 else -t
