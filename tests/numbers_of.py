"""Arrays to nested lists of one kind of number, and back."""

import mpmath
import numpy as np


def rows(x, kind):
    """An array as nested lists of ``kind`` (float, complex, mpmath.mpf, Counted)."""
    x = np.asarray(x)
    if x.ndim == 0:
        return kind(x.item())
    return [rows(part, kind) for part in x]


def run(definition, q, k, v, options, kind):
    """A definition on one head: numeric arrays among the options are converted too."""
    converted = {
        name: rows(value, kind) if isinstance(value, np.ndarray) and value.dtype != bool else value
        for name, value in options.items()
    }
    return definition(rows(q, kind), rows(k, kind), rows(v, kind), **converted)


def exact(definition, q, k, v, options):
    """The definition in 40 digits, rounded to float64."""
    with mpmath.workdps(40):
        result = run(definition, q, k, v, options, mpmath.mpf)
    return to_array(result, (len(q), v.shape[-1]))


def to_array(result, shape):
    if isinstance(result, tuple):
        y, rest = result
        return to_array(y, shape), np.array([float(x) for x in rest])
    return np.array([[float(x) for x in row] for row in result]).reshape(shape)
