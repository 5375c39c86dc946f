"""Numbers for the vectors that are the same bytes on every machine.

Only ``Generator.random`` is drawn from, which is an integer over 2^53; all else is additions,
products and comparisons of those, which IEEE 754 rounds in one way.
"""

import zlib

import numpy as np


class Draws:
    """Random arrays from a name.

    >>> Draws("a name").coins((2, 3), 0.5).shape
    (2, 3)
    """

    def __init__(self, name):
        self.rng = np.random.default_rng(zlib.crc32(name.encode()))

    def uniform(self, shape, low=0.0, high=1.0):
        return low + (high - low) * self.rng.random(shape)

    def normal(self, shape):
        """A bell of mean 0 and variance 1 from -3.5 to 3.5: the sum of four uniform numbers."""
        a, b, c, d = self.rng.random((4, *shape))
        return np.sqrt(3.0) * (((a + b) + (c + d)) - 2.0)

    def coins(self, shape, share):
        """True with a chance of ``share``."""
        return self.rng.random(shape) < share

    def whole(self, shape, stop):
        """Integers from 0 to stop - 1."""
        return np.floor(stop * self.rng.random(shape)).astype(np.int64)
