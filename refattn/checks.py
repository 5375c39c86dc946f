"""Argument checks: one wording for all. Each error says what came and what was wanted.

Nothing is repaired: an argument is accepted as it is or refused. The one conversion made here is
the contract's: float16 and bfloat16 are computed in float32, and the result is rounded once.
"""

import contextvars
import math
import numbers
import operator

import numpy as np
import scipy

COMPUTE = {"float64": "float64", "float32": "float32", "float16": "float32", "bfloat16": "float32"}
# What makes the arrays of arithmetic round more often than once: refattn.verify.rounding.
ARITHMETIC = contextvars.ContextVar("ARITHMETIC", default=None)


def floating(name, x):
    """``x`` as an array of one of the four real dtypes, or TypeError."""
    x = np.asarray(x)
    if x.dtype.name not in COMPUTE:
        raise TypeError(
            f"{name} has dtype {x.dtype}; expected float64, float32, float16 or bfloat16 "
            f"(convert it, for instance {name}.astype(numpy.float32))"
        )
    return x


def compute_dtype(dtype):
    """The dtype that arithmetic on ``dtype`` runs in."""
    return np.dtype(COMPUTE[np.dtype(dtype).name])


def qkv(q, k, v):
    """Check q (..., n, d), k (..., m, d), v (..., m, e); return them ready for arithmetic + dtype.

    The fourth value is the dtype that came in: the one that results are rounded to.
    """
    q, k, v, dtype = fitting(q, k, v)
    q, k, v = (x.astype(compute_dtype(dtype), copy=False) for x in (q, k, v))
    rounding = ARITHMETIC.get()
    return *((q, k, v) if rounding is None else map(rounding, (q, k, v))), dtype


def fitting(q, k, v):
    """Check q, k and v as ``qkv`` does; return them as they came, as arrays, and their dtype."""
    named = {"q": floating("q", q), "k": floating("k", k), "v": floating("v", v)}
    dtypes = [x.dtype.name for x in named.values()]
    if len(set(dtypes)) > 1:
        raise TypeError(f"q, k and v must share one dtype; they have {', '.join(dtypes)}")
    for name, wanted in (("q", "(..., n, d)"), ("k", "(..., m, d)"), ("v", "(..., m, e)")):
        if named[name].ndim < 2:
            raise ValueError(f"{name} has shape {named[name].shape}; expected {wanted}")
    q, k, v = named.values()
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q has {q.shape[-1]} columns, k has {k.shape[-1]}: they must agree")
    if q.shape[-1] < 1:
        raise ValueError("q and k have 0 columns; expected at least 1")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"k has {k.shape[-2]} rows, v has {v.shape[-2]}: they must agree")
    lead(q, k, v)
    return q, k, v, np.dtype(dtypes[0]) if dtypes[0] != "bfloat16" else q.dtype


def lead(*arrays):
    """The leading shape that q, k and v broadcast to, or ValueError."""
    shapes = [x.shape[:-2] for x in arrays]
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        given = ", ".join(map(str, shapes))
        raise ValueError(f"the leading axes of q, k and v do not broadcast: {given}") from None


def cotangent(name, x, shape, dtype):
    """The gradient of an output of this shape, rounded to ``dtype``, ready for arithmetic."""
    x = floating(name, x)
    if x.shape != tuple(shape):
        raise ValueError(f"{name} has shape {x.shape}; expected the output's shape {tuple(shape)}")
    return x.astype(dtype, copy=False).astype(compute_dtype(dtype), copy=False)


def saved(value, shape, dtype):
    """(y, lse) of a forward pass in the dtype of the arithmetic, or None where None came."""
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"saved is {type(value).__name__}; expected a pair (y, lse)")
    pairs = zip(("saved y", "saved lse"), value, (shape, shape[:-1]), strict=True)
    return tuple(cotangent(name, x, wanted, dtype) for name, x, wanted in pairs)


def sizes(n, m, d, e):
    """Sizes of one head, as costs take them."""
    named = {"n": (n, 0), "m": (m, 0), "d": (d, 1), "e": (e, 0)}
    return tuple(whole(name, size, least=least) for name, (size, least) in named.items())


def number(name, value, *, positive=False):
    """A finite real number as a float; with ``positive``, above zero."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}; expected a real number")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{name} is {value!r}; expected a finite number" + " > 0" * positive)
    return value


def scale(value, d):
    """The factor on q @ k.T: 1/sqrt(d) when ``value`` is None."""
    return 1 / math.sqrt(d) if value is None else number("scale", value)


def flag(name, value):
    """True or False, and nothing that merely behaves like one."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r}; expected True or False")
    return bool(value)


def whole(name, value, *, least, most=None):
    """An integer from ``least`` to ``most``."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; expected an integer") from None
    if value < least or (most is not None and value > most):
        span = f">= {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value}; expected an integer {span}")
    return value


def window(value, causal=False):
    """``window`` as (left, right), both inclusive; ``causal`` makes right 0."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"window is {value!r}; expected an integer or a pair (left, right)")
    left, right = (whole("window", side, least=0) for side in pair)
    return left, 0 if flag("causal", causal) else right


def square(name, n, m):
    """A causal form whose past comes in as a state, or not at all."""
    if n != m:
        raise ValueError(f"{name} came with n = {n}, m = {m}; it needs n = m")


def fits(name, x, shape):
    """Refuse an ``x`` that does not broadcast to ``shape``."""
    try:
        fine = np.broadcast_shapes(x.shape, shape) == tuple(shape)
    except ValueError:
        fine = False
    if not fine:
        raise ValueError(f"{name} has shape {x.shape}; expected one that broadcasts to {shape}")


def boolean_mask(mask, shape):
    """A mask of booleans (True = may attend) as a view that spans at least the last two axes."""
    if scipy.sparse.issparse(mask):
        raise TypeError("mask is a sparse array; give it to sparse_attention, or mask.toarray()")
    wanted = "True where a query may attend (real numbers that are added to the scores go in bias)"
    return _booleans("mask", mask, shape, 2, wanted)


def real_option(name, x, dtype, compute):
    """A real array rounded to q's dtype, then held in the dtype of the arithmetic."""
    x = floating(name, x)
    with np.errstate(over="ignore"):
        rounded = x.astype(dtype, copy=False).astype(compute, copy=False)
    if not (np.isfinite(rounded) | ~np.isfinite(x)).all():
        raise ValueError(f"{name} has finite entries beyond {np.dtype(dtype)}")
    return rounded


def csr_mask(mask, n, m):
    """A boolean csr_array (n, m) in canonical form: sorted, no duplicates, no stored False."""
    if not isinstance(mask, scipy.sparse.csr_array) or mask.dtype != bool:
        sparse = scipy.sparse.issparse(mask)
        came = type(mask).__name__ + (f" of {mask.dtype}" if sparse else "")
        raise TypeError(
            f"mask is {came}; expected a scipy.sparse.csr_array of bool, as refattn.masks makes "
            "(scipy.sparse.csr_array(mask) turns a dense boolean mask into one)"
        )
    if mask.shape != (n, m):
        raise ValueError(f"mask has shape {mask.shape}; expected (n, m) = {(n, m)}")
    if mask.nnz and not 0 <= mask.indices.min() <= mask.indices.max() < m:
        raise ValueError(f"mask has column indices outside 0 to {m - 1}")
    if not mask.has_canonical_format or not mask.data.all():
        mask = mask.copy()  # the next two work in place
        mask.sum_duplicates()
        mask.eliminate_zeros()
    return mask


def generator(rng):
    """A numpy Generator from a Generator or an integer seed: chance is always the caller's."""
    if isinstance(rng, np.random.Generator):
        return rng
    return np.random.default_rng(whole("rng", rng, least=0))


def choice(name, value, options):
    """One of the named options."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, options))}")
    return value


def key_mask(mask, shape):
    """A mask of keys: booleans (True = may be attended) that broadcast to (..., m)."""
    return _booleans("key_mask", mask, shape, 1, "True where a key may be attended")


def _booleans(name, mask, shape, axes, wanted):
    """Booleans that broadcast to ``shape``, as a view that spans at least its last ``axes``."""
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"{name} has dtype {mask.dtype}; expected bool, {wanted}")
    fits(name, mask, shape)
    return np.broadcast_to(mask, np.broadcast_shapes(mask.shape, shape[-axes:]))


def state(name, value, shapes, dtype):
    """(S, z) of a linear form in the dtype of the arithmetic; zeros where None came."""
    if value is None:
        return np.zeros(shapes[0][-2:], dtype), np.zeros(shapes[1][-1:], dtype)
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} is {type(value).__name__}; expected a pair (S, z)")
    parts = []
    for part, axes, x, shape in zip("Sz", (2, 1), value, shapes, strict=True):
        x = floating(f"{name} {part}", x)
        if x.shape[-axes:] != shape[-axes:]:
            raise ValueError(f"{name} {part} has shape {x.shape}; expected {shape}")
        fits(f"{name} {part}", x, shape)
        parts.append(x.astype(dtype, copy=False))
    return tuple(parts)
