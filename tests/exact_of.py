"""A definition in many digits, with 1/sqrt(d) in as many: mpmath's numbers in an array."""

import mpmath
import numpy as np

from cases import MECHANISMS
from numbers_of import run

MANY = 60


def exact_scale(mechanism, q, options):
    """{"scale": ...}; nothing for linear attention, which has none."""
    inner = getattr(options.get("attention"), "__name__", mechanism)
    if inner.startswith("linear_"):
        return {}
    scale = options.get("scale")
    return {"scale": 1 / mpmath.sqrt(q.shape[-1]) if scale is None else mpmath.mpf(scale)}


def exact_of(mechanism, q, k, v, options):
    """(n, e) objects: the attention of one head."""
    with mpmath.workdps(MANY):
        options = {**options, **exact_scale(mechanism, q, options)}
        return np.array(run(MECHANISMS[mechanism].definition, q, k, v, options, mpmath.mpf), object)
