"""What a kernel is given, what it should give, and how far off it may be."""

import numpy as np

from refattn import checks

# n, m, d, e: one token, odd sizes, more keys than queries and fewer, more than one tile
CASES = {
    "one token": (1, 1, 4, 3),
    "odd sizes": (13, 13, 5, 7),
    "two tiles": (130, 130, 16, 16),
    "more keys": (7, 12, 4, 4),
    "fewer keys": (12, 7, 4, 4),
    "large scores": (130, 130, 16, 16),
}
FAINT = {"faint keys": (13, 13, 5, 7)}  # an epsilon in the denominator shows
LARGE_FACTOR = 300.0  # on q in the last case, less where the dtype could not tell right from wrong


def number_type(name):
    """The NumPy dtype of a name; bfloat16 comes from the package ml_dtypes."""
    checks.choice("dtype", name, tuple(checks.COMPUTE))
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as missing:
        raise ValueError("dtype 'bfloat16' needs ml_dtypes: pip install ml_dtypes") from missing
    return np.dtype(ml_dtypes.bfloat16)


def eps_of(dtype):
    """Spacing of numbers just above 1."""
    return 2.0**-7 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)


def cast(value, dtype):
    """Real arrays among the options, rounded to what the kernel is given."""
    if isinstance(value, tuple):
        return tuple(cast(part, dtype) for part in value)
    if isinstance(value, np.ndarray) and value.dtype.name in checks.COMPUTE:
        return value.astype(dtype)
    return value


def _fixed_sizes(options):
    """Sizes that the options' arrays fix: {"n": ..., "m": ..., "d": ...}."""
    axes = {"mask": "nm", "bias": "nm", "gate": "n", "key_mask": "m", "E": "m", "omega": "d"}
    fixed = {}
    for name, sizes in axes.items():
        shape = np.shape(options[name]) if options.get(name) is not None else ()
        if name == "gate":
            shape = shape[:-1]
        for size, length in zip(sizes[::-1], shape[::-1], strict=False):
            if length > 1 or name in ("E", "omega"):  # an axis of 1 fits any size
                fixed[size] = length
    return fixed


def inputs_of(shapes, cases, dtype, options):
    """The cases, in the sizes that the options' arrays ask for: name, q, k, v."""
    fixed = _fixed_sizes(options)
    done = set()
    for case, (n, m, d, e) in shapes.items():
        n, m, d = fixed.get("n", n), fixed.get("m", m), fixed.get("d", d)
        kind = case if case in ("large scores", *FAINT) else ""
        if (cases == "square" and n != m) or (n, m, d, e, kind) in done:
            continue
        done.add((n, m, d, e, kind))
        rng = np.random.default_rng([n, m, d, e])
        q, k, v = (rng.standard_normal(s) for s in ((n, d), (m, d), (m, e)))
        if kind == "large scores":
            q = q * min(LARGE_FACTOR, 0.005 / eps_of(dtype))
        elif kind:
            k = k - 12  # elu + 1 is exp there: features of 1e-5
        label = case if not fixed or kind else f"{n} queries, {m} keys"
        yield label, *(x.astype(dtype) for x in (q, k, v))


def truth_and_budget(truth, q, k, v, options, wide_options):
    """float64 of the same rounded inputs, and the budget of the docstring; None if q, k, v do not
    fit the mechanism, such as n != m in a causal form that needs n = m."""
    wide = [x.astype(np.float64) for x in (q, k, v)]
    try:
        wanted = truth(*wide, **wide_options)
    except ValueError:
        if len(q) != len(k):
            return None, None
        raise
    own_error = abs(truth(q, k, v, **options).astype(float) - wanted).max(initial=0)
    scale = checks.scale(options.get("scale"), q.shape[-1])
    logits = abs(scale * (wide[0] @ wide[1].mT)).max(initial=0)
    bias = np.asarray(options.get("bias") if options.get("bias") is not None else 0.0, float)
    logits += 1 + abs(bias[np.isfinite(bias)]).max(initial=0)
    eps = eps_of(q.dtype)
    return wanted, 2 * own_error + 4 * eps * logits * abs(wide[2]).max(initial=0)
