"""Arithmetic in which every array operation is rounded to a half type, on any machine.

The formulas compute half types in float32 and round once. A kernel may round each of its steps:
how far that leads is what ``refattn.verify.check`` allows it.
"""

import contextlib

import numpy as np

from refattn import checks


class Rounded(np.ndarray):
    """float32 numbers; what any NumPy operation makes of them is rounded to ``rounds_to``.

    One operation rounds once, so a matrix product or a sum accumulates in float32, as matrix units
    do.
    """

    rounds_to = None

    def __array_finalize__(self, other):
        self.rounds_to = getattr(other, "rounds_to", None)

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        if out is not None:
            options["out"] = _plain(out)
        return self._rounded(getattr(ufunc, method)(*_plain(inputs), **options))

    def __array_function__(self, function, types, args, options):
        return self._rounded(function(*_plain(args), **_plain(options)))

    def _rounded(self, result):
        if isinstance(result, (tuple, list)):
            return type(result)(map(self._rounded, result))
        if not isinstance(result, (np.ndarray, np.floating)) or result.dtype != np.float32:
            return result
        with np.errstate(over="ignore", invalid="ignore"):
            result = np.asarray(result).astype(self.rounds_to).astype(np.float32)
        return _rounding(result, self.rounds_to)


def _rounding(x, dtype):
    x = np.asarray(x).view(Rounded)
    x.rounds_to = dtype
    return x


def _plain(x):
    """The same without rounding: arrays, and those inside tuples, lists and dicts."""
    if isinstance(x, Rounded):
        return x.view(np.ndarray)
    if isinstance(x, (tuple, list)):
        return type(x)(map(_plain, x))
    return {name: _plain(part) for name, part in x.items()} if isinstance(x, dict) else x


@contextlib.contextmanager
def every_operation_rounded(dtype):
    """Inside, formulas that compute in float32 round every array operation to ``dtype``.

    Examples
    --------
    The mean of 4096, 1 and 1 is 1366, but float16 has no 4098 on the way to it:

    >>> import numpy as np, refattn
    >>> q, k = np.zeros((1, 1), np.float16), np.zeros((3, 1), np.float16)
    >>> v = np.array([[4096], [1], [1]], np.float16)
    >>> float(refattn.linear_attention(q, k, v)[0, 0])
    1366.0
    >>> with every_operation_rounded(np.float16):
    ...     float(refattn.linear_attention(q, k, v)[0, 0])
    1365.0
    """
    token = checks.ARITHMETIC.set(lambda x: _rounding(x, dtype))
    try:
        yield
    finally:
        checks.ARITHMETIC.reset(token)
