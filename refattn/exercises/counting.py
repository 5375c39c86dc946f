"""FLOPs of a NumPy function, counted while it runs on arrays that count.

By the rule of ``refattn.cost``: a multiplication, an addition, exp, a division, a comparison are
one each; a sum or a maximum of m terms is m. What is done to q, k, v, or to anything computed from
them, is counted; what a function does to arrays of its own alone is not.
"""

from math import prod

import numpy as np

# Elementwise functions that are one FLOP a number; on integers and booleans they are bookkeeping.
ONE_FLOP = frozenset(
    [
        "add",
        "subtract",
        "multiply",
        "divide",
        "true_divide",
        "negative",
        "exp",
        "exp2",
        "expm1",
        "log",
        "log2",
        "log1p",
        "sqrt",
        "square",
        "reciprocal",
        "tanh",
        "sinh",
        "cosh",
        "sin",
        "cos",
        "power",
        "float_power",
        "maximum",
        "minimum",
        "fmax",
        "fmin",
        "greater",
        "greater_equal",
        "less",
        "less_equal",
        "equal",
        "not_equal",
        "logaddexp",
    ]
)
PRODUCTS = {np.dot, np.inner, np.tensordot, np.outer, np.vdot}


class Tally:
    """The FLOPs so far."""

    def __init__(self):
        self.flops = 0


class Counted(np.ndarray):
    """An array that adds what is done to it to a tally, which its results share."""

    tally = None

    def __array_finalize__(self, parent):
        self.tally = getattr(parent, "tally", None)

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        tally = _tally_of(inputs) or _tally_of(out or ())
        plain = [_plain(x) for x in inputs]
        if out is not None:
            options["out"] = tuple(_plain(x) for x in out)
        if isinstance(options.get("where"), Counted):
            options["where"] = _plain(options["where"])
        result = getattr(ufunc, method)(*plain, **options)
        tally.flops += _flops(ufunc, method, plain, result)
        if out is not None:
            return out[0] if len(out) == 1 else out
        return _wrapped(result, tally)

    def dot(self, other, out=None):
        return np.dot(self, other, out=out)

    def cumsum(self, *args, **options):
        self.tally.flops += self.size
        return _wrapped(_plain(self).cumsum(*args, **options), self.tally)

    def __array_function__(self, function, types, args, kwargs):
        tally = _tally_of(args) or _tally_of(kwargs.values())
        if function is np.einsum:
            result = np.einsum(*map(_plain, args), **kwargs)
            tally.flops += _einsum_flops(args)
        elif function in PRODUCTS:
            result = function(*map(_plain, args), **kwargs)
            tally.flops += _product_flops(args, result)
        else:
            result = super().__array_function__(function, types, args, kwargs)
        return _wrapped(result, tally)


def count_flops(function, *arrays):
    """FLOPs of ``function(*arrays)``.

    Examples
    --------
    >>> a, b = np.ones((3, 4)), np.ones((4, 5))
    >>> count_flops(lambda a, b: np.exp(a @ b), a, b)  # 2 * 3 * 4 * 5 + 3 * 5
    135
    """
    tally = Tally()
    function(*(_wrapped(np.array(x), tally) for x in arrays))
    return tally.flops


def _wrapped(result, tally):
    if type(result) in (tuple, list):
        return type(result)(_wrapped(x, tally) for x in result)
    if not isinstance(result, np.ndarray):
        return result
    result = result.view(Counted)
    result.tally = tally
    return result


def _plain(x):
    return x.view(np.ndarray) if isinstance(x, Counted) else x


def _tally_of(values):
    """The tally of the first counted array among values, which may be nested one deep."""
    for x in values:
        if isinstance(x, Counted):
            return x.tally
        if isinstance(x, (tuple, list)) and (found := _tally_of(x)):
            return found
    return None


def _flops(ufunc, method, inputs, result):
    name, first = ufunc.__name__, np.asarray(inputs[0])
    if not any(np.asarray(x).dtype.kind in "fc" for x in inputs):
        return 0
    if name in ("matmul", "vecdot", "matvec", "vecmat"):
        return 2 * np.size(result) * first.shape[-1]
    if name not in ONE_FLOP:
        return 0
    return np.size(result) if method in ("__call__", "outer") else first.size


def _product_flops(args, result):
    a, b = (np.asarray(_plain(x)) for x in args[:2])
    # Every entry of the result is a sum over the axes that the two share.
    terms = round((a.size * b.size / max(np.size(result), 1)) ** 0.5) if np.size(result) else 0
    return (2 * terms if terms > 1 else 1) * np.size(result)


def _einsum_flops(args):
    """One multiplication for each further operand and one addition, for every set of indices."""
    subscripts, *operands = args
    if not isinstance(subscripts, str):
        raise TypeError("einsum is counted when its subscripts come as a string")
    sizes = {}
    for axes, x in zip(
        subscripts.replace(" ", "").split("->")[0].split(","), operands, strict=True
    ):
        shape = np.shape(x)
        if "..." in axes:
            before, after = axes.split("...")
            named = len(before) + len(after)
            middle = [f"...{i}" for i in range(len(shape) - named, 0, -1)]
            names = [*before, *middle, *after]
        else:
            names = list(axes)
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    return len(operands) * prod(sizes.values())
