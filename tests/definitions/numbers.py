"""Numbers that count, and functions that take any kind of number."""

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
        divisor = plain(other)
        return self._new(self.value / divisor if divisor else 0)

    def __gt__(self, other):
        Counted.flops += 1
        return self.value > plain(other)


def plain(x):
    return x.value if isinstance(x, Counted) else x


def elementary(name):
    """exp, log and the like for each kind of number."""

    @singledispatch
    def function(x):
        return getattr(math, name)(x)

    function.register(complex, getattr(cmath, name))
    function.register(mpmath.mpf, getattr(mpmath, name))
    function.register(mpmath.mpc, getattr(mpmath, name))
    function.register(Counted, lambda x: x._new(function(x.value)))
    return function


exp, tanh, positive_log = elementary("exp"), elementary("tanh"), elementary("log")
cos, sin = elementary("cos"), elementary("sin")


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
