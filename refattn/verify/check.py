"""The check itself: a kernel on cases, or an answer beside the right one."""

import numpy as np

import refattn
from refattn import checks
from refattn.verify.report import Line, Report

# n, m, d, e: one token, odd sizes, more keys than queries and fewer, more than one tile
CASES = {
    "one token": (1, 1, 4, 3),
    "odd sizes": (13, 13, 5, 7),
    "two tiles": (130, 130, 16, 16),
    "more keys": (7, 12, 4, 4),
    "fewer keys": (12, 7, 4, 4),
}
LARGE = "large logits"  # the odd sizes again, with q times this much
LARGE_FACTOR = 300.0


def check(kernel, mechanism, *, dtype="float32", cases="default", hint="", **options):
    r"""Hold ``kernel(q, k, v)`` against one of refattn's attentions.

    The truth is the formula in float64 on the same rounded inputs. A kernel passes when

    .. math:: |error| \le 2 E + 4\, \mathrm{eps}\, (1 + \max|s|) \max|v|

    with E the error of refattn's own formula in the kernel's dtype and s the logits.

    Parameters
    ----------
    kernel : callable
        ``kernel(q, k, v) -> y`` on one head, arrays (n, d), (m, d), (m, e) to (n, e), with the
        options built in.
    mechanism : str or function
        The attention to be equal to, such as "local_attention".
    dtype : {"float32", "float64", "float16"}
        What the kernel is given.
    cases : {"default", "square"}
        "square" leaves out the cases with n != m.
    hint : str
        What to say while the kernel is an unfilled hole, one that returns None or ``...``.
    **options
        The mechanism's options. A mask or bias fixes n and m: only matching cases run.

    Returns
    -------
    Report
        Whatever the kernel does, an exception included, ends as a line of the report.

    Raises
    ------
    ValueError
        Unknown mechanism or cases, or options that no case fits: the fault is not the kernel's.

    Examples
    --------
    >>> import numpy as np
    >>> def kernel(q, k, v):
    ...     a = np.exp(q @ k.T)  # the scale is missing
    ...     return a @ v / a.sum(axis=1, keepdims=True)
    >>> check(kernel, "softmax_attention").passed
    False
    """
    name = getattr(mechanism, "__name__", mechanism)
    truth = getattr(refattn, str(name), None)
    if truth is None or not hasattr(refattn, f"{name}_vjp"):
        raise ValueError(f"mechanism is {name!r}; expected an attention such as 'local_attention'")
    checks.choice("cases", cases, ("default", "square"))
    lines = []
    for case, q, k, v in _inputs(cases, np.dtype(dtype), options):
        try:
            y = kernel(q.copy(), k.copy(), v.copy())
        except Exception as error:
            y = error
        if y is None or y is ...:
            return Report(name, hint=hint)
        lines.append(_judge(case, y, truth, q, k, v, options))
    if not lines:
        raise ValueError(f"no case fits the shapes of the options {sorted(options)}")
    return Report(name, lines)


def check_answer(answer, wanted, *, title="answer", tolerance=0.0, hint=""):
    """Hold a number or an array against the right one.

    Parameters
    ----------
    answer : number, array, or ``...`` (or None) while nothing has been filled in
    wanted : number or array
    title : str
        What the answer is.
    tolerance : float
        Largest absolute error that is still right.
    hint : str
        What to say while nothing has been filled in.

    Returns
    -------
    Report

    Examples
    --------
    >>> print(check_answer(..., 6, title="pairs", hint="Count the row sums."))
    pairs: nothing here yet. Count the row sums.
    >>> check_answer(6, 6).passed
    True
    """
    if answer is None or answer is ...:
        return Report(title, hint=hint)
    return Report(title, [_compare(title, answer, np.asarray(wanted), tolerance)])


def _inputs(cases, dtype, options):
    """The cases that the options' arrays fit: name, q, k, v."""
    fixed = [np.shape(options[name])[-2:] for name in ("mask", "bias") if name in options]
    large = {LARGE: CASES["odd sizes"]}
    for case, (n, m, d, e) in {**CASES, **large}.items():
        if fixed:
            n, m = fixed[0]
        if cases == "square" and n != m:
            continue
        rng = np.random.default_rng([n, m, d, e])
        q, k, v = (rng.standard_normal(s) for s in ((n, d), (m, d), (m, e)))
        q = q * (LARGE_FACTOR if case == LARGE else 1)
        yield case, *(x.astype(dtype) for x in (q, k, v))


def _judge(case, y, truth, q, k, v, options):
    """Compare with float64 of the same inputs, within the budget of the docstring."""
    q64, k64, v64 = (x.astype(np.float64) for x in (q, k, v))
    wanted = truth(q64, k64, v64, **options)
    own_error = abs(truth(q, k, v, **options) - wanted).max(initial=0)
    scale = checks.scale(options.get("scale"), q.shape[-1])
    logits = 1 + abs(scale * (q64 @ k64.mT)).max(initial=0)
    eps = float(np.finfo(q.dtype).eps)
    budget = 2 * own_error + 4 * eps * logits * abs(v64).max(initial=0)
    return _compare(case, y, wanted, budget)


def _compare(case, y, wanted, budget):
    if isinstance(y, Exception):
        return Line(case, np.inf, budget, f"raised {type(y).__name__}: {y}")
    try:
        y = np.asarray(y, float)
    except (TypeError, ValueError):
        return Line(case, np.inf, budget, f"gave {type(y).__name__}, expected numbers")
    if y.shape != wanted.shape:
        return Line(case, np.inf, budget, f"has shape {y.shape}, expected {wanted.shape}")
    error = abs(y - wanted)
    worst = float(np.max(error, initial=0))
    if worst <= budget:
        return Line(case, worst, budget)
    return Line(case, worst, budget, _where(y, wanted, ~(error <= budget)))


def _where(y, wanted, wrong):
    """Words for the place of the error: how many entries, which rows, the first of them."""
    if wanted.ndim == 0:
        return f"gave {y:.6g}, expected {wanted:.6g}"
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    words = f"first at {at}: {y[at]:.6g}, expected {wanted[at]:.6g}"
    rows = np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))
    if len(rows) < len(wrong):
        span = f"row {rows[0]}" if len(rows) == 1 else f"rows {rows[0]} to {rows[-1]}"
        words = f"{len(rows)} of {len(wrong)} rows wrong, {span}; {words}"
    nan = int(np.isnan(y).sum())
    return f"{nan} of {y.size} are NaN; {words}" if nan else words
