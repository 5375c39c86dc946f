"""Balls: numbers known up to a radius, which each operation carries along; and their gradients.

A ball stands for every number within ``rad`` of ``mid``. What an operation returns holds the exact
result for whatever numbers came in, and the rounding of the operation itself (midpoint-radius
arithmetic: Johansson 2017, arXiv:1611.02831). Balls that begin at a leaf remember how they were
made, so that ``gradients`` can go back: a derivation of its own beside the formulas' vjps.
"""

import itertools

import numpy as np

UNDER = 1 - 2.0**-40  # a size is rounded up; times this it is at most what it stands for
FAINT = 2.0**-960  # more than e^-1000
_ages = itertools.count()


class Ball:
    """An array of balls; +, -, *, /, @ with balls and with exact numbers."""

    __array_ufunc__ = None  # NumPy's arrays leave operators with a ball to the ball

    def __init__(self, numbers, mid, rad=0.0, made_from=(), leaf=False):
        self.numbers, self.mid, self.rad = numbers, mid, rad
        self.made_from = [(parent, pull) for parent, pull in made_from if parent.taped]
        self.taped = leaf or bool(self.made_from)
        self.age = next(_ages)

    @property
    def shape(self):
        return self.mid.shape

    @property
    def plain(self):
        """The same without its history."""
        return Ball(self.numbers, self.mid, self.rad) if self.taped else self

    @property
    def size(self):
        return self.numbers.size(self.mid)

    def _ball(self, other):
        return other if isinstance(other, Ball) else Ball(self.numbers, self.numbers.of(other))

    def _new(self, mid, rad, *made_from):
        return Ball(self.numbers, mid, rad, made_from)

    def __add__(self, other):
        other = self._ball(other)
        mid = self.numbers.add(self.mid, other.mid)
        rad = self.rad + other.rad + self.numbers.unit * self.numbers.size(mid)
        a, b = self.shape, other.shape
        return self._new(
            mid, rad, (self, lambda g: summed_to(g, a)), (other, lambda g: summed_to(g, b))
        )

    def __neg__(self):
        return self._new(self.numbers.negative(self.mid), self.rad, (self, lambda g: -g))

    def __sub__(self, other):
        return self + -self._ball(other)

    def __mul__(self, other):
        other = self._ball(other)
        a, b = self.plain, other.plain
        mid = self.numbers.multiply(a.mid, b.mid)
        rad = a.size * b.rad + a.rad * b.size + a.rad * b.rad
        rad = rad + self.numbers.unit * self.numbers.size(mid)
        if self.numbers.tiny:
            rad = rad + self.numbers.tiny * ((a.size + a.rad > 0) & (b.size + b.rad > 0))
        return self._new(
            mid,
            rad,
            (self, lambda g: summed_to(g * b, a.shape)),
            (other, lambda g: summed_to(g * a, b.shape)),
        )

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other):
        return -self + other

    def over(self, other):
        """self / other, and 0 where other is exactly 0: the house's rule for a row without keys."""
        a, b = self.plain, other.plain
        zero = b.numbers.is_zero(b.mid) & (np.asarray(b.rad) == 0)
        one = b.numbers.of(np.ones(()))
        safe = b.numbers.each(lambda x, o: np.where(b.numbers.is_zero(b.mid), o, x), b.mid, one)
        mid = self.numbers.divide(a.mid, safe)
        mid = self.numbers.each(lambda x: np.where(zero, 0 * x, x), mid)
        room = b.size * UNDER - b.rad
        unknown = ~np.asarray(room > 0, bool)
        size = self.numbers.size(mid)
        lost = 8 * np.spacing(0.0) if self.numbers.tiny else 0.0  # where b times a digit underflows
        rad = (a.rad + size * b.rad + lost) / np.where(unknown, 1, room) * (1 + 2.0**-40)
        rad = rad + self.numbers.unit * size + self.numbers.tiny
        rad = np.where(zero, 0, np.where(unknown, np.inf, rad))
        found = self._new(mid, rad)
        return self._new(
            mid,
            rad,
            (self, lambda g: summed_to(g.over(b), a.shape)),
            (other, lambda g: summed_to(-(g.over(b) * found), b.shape)),
        )

    def __matmul__(self, other):
        other = self._ball(other)
        a, b = self.plain, other.plain
        mid, rad = self.numbers.matmul(a.mid, b.mid)
        if np.any(b.rad):
            rad = rad + a.size @ np.broadcast_to(b.rad, b.shape)
        if np.any(a.rad):
            rad = rad + np.broadcast_to(a.rad, a.shape) @ (b.size + b.rad)
        if self.numbers.tiny and (np.any(a.rad) or np.any(b.rad)):  # products of radii underflow
            a_some, b_some = ((x.size + x.rad > 0).astype(float) for x in (a, b))
            rad = rad + self.numbers.tiny * (a_some @ b_some)
        return self._new(
            mid,
            rad,
            (self, lambda g: summed_to(g @ b.mT, a.shape)),
            (other, lambda g: summed_to(a.mT @ g, b.shape)),
        )

    def __rmatmul__(self, other):
        return self._ball(other) @ self

    def _function(self, mid, slope, pull, relative=False):
        """A function's value; ``slope`` bounds its derivative over the ball, ``pull(g, value)``
        takes a gradient back."""
        size = self.numbers.size(mid)
        rad = slope * self.rad + self.numbers.unit * (size if relative else size + 1)
        rad = rad + self.numbers.tiny
        value = self._new(mid, rad)
        return self._new(mid, rad, (self, lambda g: pull(g, value)))

    def exp(self):
        mid = self.numbers.exp(self.mid)
        growth = np.where(np.asarray(self.rad < 0.5, bool), 1.3, np.inf)  # (e^r - 1) / r
        found = self._function(mid, growth * self.numbers.size(mid), None, relative=True)
        most = self.float_mid() + self.numbers.float_of(np.broadcast_to(self.rad, self.shape))
        rad = np.where(most < -1000, np.fmin(found.rad, FAINT), found.rad)
        value = self._new(mid, rad)
        return self._new(mid, rad, (self, lambda g: g * value))

    def log(self):
        """Of balls without 0."""
        me, room = self.plain, self.size * UNDER - self.rad
        safe = np.asarray(room > 0, bool)
        slope = np.where(safe, 1, np.inf) / np.where(safe, room, 1)
        return self._function(self.numbers.log(self.mid), slope, lambda g, value: g.over(me))

    def root(self):
        """The square root of a constant > 0."""
        mid = self.numbers.root(self.mid)
        size = self.numbers.size(mid)  # sqrt(x) - sqrt(x - r) <= r / sqrt(x)
        return self._new(mid, self.rad / size * (1 + 2.0**-40) + self.numbers.unit * size)

    def tanh(self):
        slope_of = lambda g, value: g * (1 - value * value)
        return self._function(self.numbers.tanh(self.mid), 1, slope_of)

    def cos_sin(self):
        cos, sin = self.numbers.cos_sin(self.mid)
        fixed_cos, fixed_sin = (self._function(x, 1, None).plain for x in (cos, sin))
        return (
            self._function(cos, 1, lambda g, value: -(g * fixed_sin)),
            self._function(sin, 1, lambda g, value: g * fixed_cos),
        )

    def sum(self, axis, keepdims=False):
        shape, levels = self.shape, max(1, self.shape[axis])
        mid = self.numbers.total(self.mid, axis)
        rad = np.broadcast_to(self.rad, shape).sum(axis=axis)
        rad = rad + self.numbers.unit * levels * self.size.sum(axis=axis)
        if keepdims:
            mid = self.numbers.each(lambda x: np.expand_dims(x, axis), mid)
            rad = np.expand_dims(rad, axis)

        def spread(g):
            return g._moved(
                lambda x: np.broadcast_to(x if keepdims else np.expand_dims(x, axis), shape)
            )

        return self._new(mid, rad, (self, spread))

    def _moved(self, function, pull=None):
        """Entries moved, none changed."""
        rad = function(np.broadcast_to(self.rad, self.shape))
        made_from = () if pull is None else ((self, pull),)
        return self._new(self.numbers.each(function, self.mid), rad, *made_from)

    def where(self, mask):
        """0 where the mask is False."""
        shape = self.shape
        return self._moved(
            lambda x: np.where(mask, x, 0), lambda g: summed_to(g.where(mask), shape)
        )

    @property
    def mT(self):
        return self._moved(lambda x: np.swapaxes(x, -1, -2), lambda g: g.mT)

    def __getitem__(self, index):
        """Slices, new axes, and positions that do not repeat."""
        shape = self.shape

        def put(x):
            whole = np.zeros(shape, x.dtype)
            whole[index] = x
            return whole

        return self._moved(lambda x: x[index], lambda g: g._moved(put))

    def first_largest(self, axis):
        """The largest along an axis; its gradient goes to the first, and is unknown where balls of
        several overlap."""
        at = np.expand_dims(self.numbers.first_largest(self.mid, axis), axis)
        chosen = np.zeros(self.shape, bool)
        np.put_along_axis(chosen, at, True, axis)
        rad = np.broadcast_to(self.rad, self.shape)

        def pick(x):
            return np.take_along_axis(x, at, axis).squeeze(axis)

        mid = self.numbers.each(pick, self.mid)
        least = self.numbers.each(lambda x: np.expand_dims(x, axis), mid)
        gap = self.numbers.add(least, self.numbers.negative(self.mid))
        both = rad + np.take_along_axis(rad, at, axis)
        apart = np.asarray(self.numbers.size(gap) * UNDER > both, bool)
        doubt = ~apart & ~chosen & np.asarray(both != 0, bool)
        doubt = doubt | (chosen & doubt.any(axis=axis, keepdims=True))

        def pull(g):
            back = g._moved(lambda x: np.where(chosen, np.expand_dims(x, axis), 0))
            return Ball(back.numbers, back.mid, np.where(doubt, np.inf, back.rad))

        return self._new(mid, rad.max(axis=axis), (self, pull))

    def float_mid(self):
        """Midpoints in float64, for shifts and for looks."""
        return self.numbers.rounded(self.mid)[0]

    def rounded(self):
        """float64 numbers, and a bound on the distance of each from the exact one; 0 for a ball
        that holds it."""
        value, rest = self.numbers.rounded(self.mid)
        rad = self.numbers.float_of(np.broadcast_to(self.rad, self.shape))
        error = self.numbers.float_of(rest) + rad
        zero = np.abs(value) <= error
        value, error = np.where(zero, 0.0, value), np.where(zero, np.abs(value) + error, error)
        # radii are themselves rounded, each time by less than 2^-40 of them
        return value, np.where(np.isnan(error), np.inf, error * 1.001)


def joined(balls, axis):
    """Balls one after the other along an axis; their other axes broadcast."""
    lead = np.broadcast_shapes(*(_without(b.shape, axis) for b in balls))
    wide = [_broadcast(b, lead, axis) for b in balls]
    numbers, made, start = balls[0].numbers, [], 0
    for original, ball in zip(balls, wide, strict=True):
        part = slice(start, start + ball.shape[axis])
        index = (..., part, *[slice(None)] * (-axis - 1))
        made.append((original, lambda g, i=index, s=original.shape: summed_to(g[i], s)))
        start = part.stop
    mid = numbers.each(lambda *xs: np.concatenate(xs, axis=axis), *(b.mid for b in wide))
    rad = np.concatenate([np.broadcast_to(b.rad, b.shape) for b in wide], axis=axis)
    return Ball(numbers, mid, rad, made)


def _without(shape, axis):
    return (*shape[:axis], 1, *shape[len(shape) + axis + 1 :])


def _broadcast(ball, lead, axis):
    shape = list(lead)
    shape[axis] = ball.shape[axis]
    return ball.plain._moved(lambda x: np.broadcast_to(x, shape))


def summed_to(ball, shape):
    """Broadcast axes summed, so that a gradient has its input's shape."""
    while len(ball.shape) > len(shape):
        ball = ball.plain.sum(0)
    for axis, length in enumerate(shape):
        if length == 1 and ball.shape[axis] != 1:
            ball = ball.plain.sum(axis, keepdims=True)
    return ball


def gradients(outputs, leaves):
    """Of the sum of ball * cotangent over pairs in ``outputs``, with respect to each leaf."""
    waiting, known = {}, {}

    def give(ball, g):
        known[ball] = known[ball] + g if ball in known else g
        waiting[ball] = None

    for ball, cotangent in outputs:
        if ball.taped:
            give(ball, summed_to(ball._ball(cotangent).plain, ball.shape))
    while waiting:
        ball = max(waiting, key=lambda b: b.age)  # all that was made from it is done
        del waiting[ball]
        for parent, pull in ball.made_from:
            give(parent, pull(known[ball]))
    nothing = [x.numbers.of(np.zeros(x.shape)) for x in leaves]
    return [known.get(x, Ball(x.numbers, zero)) for x, zero in zip(leaves, nothing, strict=True)]
