"""The two arithmetics that a definition can run in: double-double, and mpmath with any digits.

Both give arrays of numbers, ``UNIT``-like bounds on the error of one operation, and the same
functions; ``refattn.verify.certain.ball`` is written over either.
"""

import numpy as np

from refattn.verify.certain import doubles
from refattn.verify.certain.doubles import Double

LARGEST = np.finfo(float).max


class DoubleDouble:
    """Pairs of float64: 31 digits, exponents as float64 has them, all of NumPy's speed."""

    unit, tiny = doubles.UNIT, doubles.TINY
    exp, log, tanh = (
        staticmethod(doubles.exp),
        staticmethod(doubles.log),
        staticmethod(doubles.tanh),
    )
    cos_sin, root = staticmethod(doubles.cos_sin), staticmethod(doubles.square_root)
    add, negative = staticmethod(doubles.add), staticmethod(doubles.negative)
    multiply, divide = staticmethod(doubles.multiply), staticmethod(doubles.divide)
    total, matmul = staticmethod(doubles.total), staticmethod(doubles.matmul)

    def of(self, x):
        """Numbers that hold x exactly."""
        return Double(np.array(x, float))

    def size(self, x):
        """At least |x|."""
        size = np.abs(x.hi)
        return np.maximum(size, np.minimum(size * (1 + 2.0**-50), LARGEST))

    def each(self, function, *xs):
        """An operation that moves entries, on all parts of the numbers."""
        return Double(function(*(x.hi for x in xs)), function(*(x.lo for x in xs)))

    def is_zero(self, x):
        return x.hi == 0

    def first_largest(self, x, axis):
        """The index of the first of the largest entries."""
        top = x.hi.max(axis=axis, keepdims=True)
        return np.where(x.hi == top, x.lo, -np.inf).argmax(axis=axis)

    def rounded(self, x):
        """float64, and a bound on what it lacks."""
        return x.hi + x.lo, np.abs(x.lo)

    def float_of(self, size):
        """Radii in float64, rounded up."""
        return np.asarray(size, float)


class Digits:
    """mpmath's numbers with so many digits, and exponents without an end: slow."""

    tiny = 0.0

    def __init__(self, digits):
        import mpmath

        self.context = mpmath.MPContext()  # not the one whose precision a user may set
        self.context.dps = digits
        self.unit = self.context.mpf(10) ** (1 - digits)
        self.exp, self.log, self.tanh = map(self._each_number, ("exp", "log", "tanh"))
        self.root = self._each_number("sqrt")
        self._cos, self._sin = map(self._each_number, ("cos", "sin"))
        self.add, self.negative = map(_as_array, (np.add, np.negative))
        self.multiply, self.divide, self.size = map(_as_array, (np.multiply, np.divide, np.abs))

    def _each_number(self, name):
        return _as_array(np.frompyfunc(getattr(self.context, name), 1, 1))

    def of(self, x):
        return self._each_number("mpf")(np.array(x, float))

    def each(self, function, *xs):
        return np.asarray(function(*xs), object)

    def is_zero(self, x):
        return np.asarray(x == 0, bool)

    def first_largest(self, x, axis):
        return np.argmax(x, axis=axis)

    def cos_sin(self, x):
        return self._cos(x), self._sin(x)

    def total(self, x, axis):
        return np.asarray(x.sum(axis=axis) + self.context.mpf(0), object)

    def matmul(self, x, y):
        inner = x.shape[-1]
        if inner == 0:
            shape = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
            return self.of(np.zeros((*shape, x.shape[-2], y.shape[-1]))), 0.0
        return x @ y, self.unit * (inner + 1) * (np.abs(x) @ np.abs(y))

    def rounded(self, x):
        near = np.asarray(x, float)
        return near, self.size(x - near)

    def float_of(self, size):
        up = np.asarray(size != 0, bool) * np.spacing(0.0)  # float64's range may end before size
        return np.asarray(size, float) * (1 + 2.0**-50) + up


def _as_array(function):
    """NumPy makes a bare number of an array of one object; here it stays an array."""
    return lambda *xs: np.asarray(function(*xs), object)
