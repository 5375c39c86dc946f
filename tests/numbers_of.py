"""Arrays to nested lists of one kind of number, and back."""

import mpmath
import numpy as np


def rows(x, kind):
    """An array as nested lists of ``kind`` (float, complex, mpmath.mpf, Counted)."""
    x = np.asarray(x)
    if x.ndim == 0:
        return kind(x.item())
    return [rows(part, kind) for part in x]


def converted(value, kind):
    """Real arrays, inside tuples too; masks and all else as they are."""
    if isinstance(value, tuple) and any(isinstance(part, np.ndarray) for part in value):
        return tuple(converted(part, kind) for part in value)
    if isinstance(value, np.ndarray) and value.dtype != bool:
        return rows(value, kind)
    return value


def run(definition, q, k, v, options, kind):
    """A definition on one head: numeric arrays among the options are converted too."""
    options = {name: converted(value, kind) for name, value in options.items()}
    return definition(rows(q, kind), rows(k, kind), rows(v, kind), **options)


def exact(definition, q, k, v, options):
    """The definition in 40 digits, rounded to float64."""
    with mpmath.workdps(40):
        return to_array(run(definition, q, k, v, options, mpmath.mpf), v.shape[-1])


def loops(definition, q, k, v, options):
    """The definition in Python's floats."""
    return to_array(run(definition, q, k, v, options, float), v.shape[-1])


def to_array(result, e):
    """Rows of numbers as an array (rows, e); with a second result, a pair of arrays."""
    if isinstance(result, tuple):
        y, rest = result
        return to_array(y, e), np.array([float(x) for x in rest])
    return np.array([[float(x) for x in row] for row in result]).reshape(len(result), e)
