"""The check itself: a kernel on cases, or an answer beside the right one."""

import numpy as np

import refattn
from refattn import checks
from refattn.verify.mistakes import LINEAR, equal_mistakes
from refattn.verify.report import Line, Report

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


def check(kernel, mechanism, *, dtype="float32", cases="default", title=None, hint="", **options):
    r"""Hold ``kernel(q, k, v)`` against one of refattn's attentions.

    The truth is the formula in float64 on the same rounded inputs. A kernel passes when

    .. math:: |error| \le 2 E + 4\, \mathrm{eps}\, (1 + \max|s|) \max|v|

    with E the error of refattn's own formula in the kernel's dtype (float16 is computed in float32
    and rounded once) and s the logits.

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
    title : str, optional
        The name in the report; the kernel's own if None.
    hint : str
        What to say while the kernel is an unfilled hole, one that returns None or ``...``.
    **options
        The mechanism's options, real arrays rounded to ``dtype``. Where an array fixes n, m or d,
        the cases take those sizes.

    Returns
    -------
    Report
        Whatever the kernel does, an exception included, ends as a line of the report. Its
        ``diagnosis`` names the known mistakes that the kernel equals in every case.

    Raises
    ------
    ValueError
        Unknown mechanism or cases, or options that no case fits: the fault is not the kernel's.
        ``return_lse`` and ``return_state`` are refused: the kernel's y is what is compared.

    Examples
    --------
    >>> import numpy as np
    >>> def kernel(q, k, v):
    ...     a = np.exp(q @ k.T)  # the scale is missing
    ...     return a @ v / a.sum(axis=1, keepdims=True)
    >>> report = check(kernel, "softmax_attention")
    >>> report.passed, report.diagnosis
    (False, ('scale missing: the scores are q . k, not q . k / sqrt(d)',))
    """
    name = getattr(mechanism, "__name__", mechanism)
    truth = getattr(refattn, str(name), None)
    if truth is None or not hasattr(refattn, f"{name}_vjp"):
        raise ValueError(f"mechanism is {name!r}; expected an attention such as 'local_attention'")
    checks.choice("cases", cases, ("default", "square"))
    for refused in ("return_lse", "return_state"):
        if options.get(refused):
            raise ValueError(f"{refused}=True came; only the output y is compared")
    title = title or getattr(kernel, "__name__", type(kernel).__name__)
    options = {name: _cast(value, dtype) for name, value in options.items()}
    lines, seen = [], []
    wide = {name: _cast(value, np.float64) for name, value in options.items()}
    faint = FAINT if name in LINEAR else {}
    for case, q, k, v in _inputs({**CASES, **faint}, cases, np.dtype(dtype), options):
        wanted, budget = _truth_and_budget(truth, q, k, v, options)
        if wanted is None:
            continue
        try:
            y = kernel(q.copy(), k.copy(), v.copy())
        except Exception as error:
            y = error
        if y is None or y is ...:
            return Report(title, hint=hint)
        lines.append(_compare(case, y, wanted, budget))
        y = _numbers(y)
        if y is not None and y.shape == wanted.shape:
            inputs = (x.astype(float) for x in (q, k, v))
            seen.append((y, wanted, budget, float(np.finfo(q.dtype).eps), *inputs, wide))
    if not lines:
        raise ValueError(f"no case fits the shapes of the options {sorted(options)}")
    return Report(title, lines, diagnosis=_diagnosis(name, lines, seen))


def check_answer(answer, wanted, *, title="answer", tolerance=0.0, hint=""):
    """Hold a number or an array against the right one.

    Parameters
    ----------
    answer : number, array, or a function of no arguments that gives one
        ``...`` or None while nothing has been filled in. What a function raises is reported.
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
    if callable(answer):
        try:
            answer = answer()
        except Exception as error:
            answer = error
    if answer is None or answer is ...:
        return Report(title, hint=hint)
    return Report(title, [_compare(title, answer, np.asarray(wanted), tolerance)])


def _diagnosis(mechanism, lines, seen):
    """The known mistakes that the kernel equals, each in a sentence; empty if all is right."""
    if not any(line.trouble for line in lines):
        return ()
    return tuple(f"{m.name}: {m.tells}" for m in equal_mistakes(mechanism, seen))


def _cast(value, dtype):
    """Real arrays among the options, rounded to what the kernel is given."""
    if isinstance(value, tuple):
        return tuple(_cast(part, dtype) for part in value)
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
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


def _inputs(shapes, cases, dtype, options):
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
            q = q * min(LARGE_FACTOR, 0.005 / np.finfo(dtype).eps)
        elif kind:
            k = k - 12  # elu + 1 is exp there: features of 1e-5
        label = case if not fixed or kind else f"{n} queries, {m} keys"
        yield label, *(x.astype(dtype) for x in (q, k, v))


def _truth_and_budget(truth, q, k, v, options):
    """float64 of the same rounded inputs, and the budget of the docstring; None if q, k, v do not
    fit the mechanism, such as n != m in a causal form that needs n = m."""
    wide = [x.astype(np.float64) for x in (q, k, v)]
    try:
        wanted = truth(*wide, **{name: _cast(x, np.float64) for name, x in options.items()})
    except ValueError:
        if len(q) != len(k):
            return None, None
        raise
    own_error = abs(truth(q, k, v, **options) - wanted).max(initial=0)
    scale = checks.scale(options.get("scale"), q.shape[-1])
    logits = abs(scale * (wide[0] @ wide[1].mT)).max(initial=0)
    bias = np.asarray(options.get("bias") if options.get("bias") is not None else 0.0, float)
    logits += 1 + abs(bias[np.isfinite(bias)]).max(initial=0)
    eps = float(np.finfo(q.dtype).eps)
    return wanted, 2 * own_error + 4 * eps * logits * abs(wide[2]).max(initial=0)


def _compare(case, y, wanted, budget):
    if isinstance(y, Exception):
        return Line(case, np.inf, budget, f"raised {type(y).__name__}: {y}")
    given, y = type(y).__name__, _numbers(y)
    if y is None:
        return Line(case, np.inf, budget, f"gave {given}, expected real numbers")
    if y.shape != wanted.shape:
        return Line(case, np.inf, budget, f"has shape {y.shape}, expected {wanted.shape}")
    with np.errstate(invalid="ignore"):
        error = np.where(y == wanted, 0, abs(y - wanted))  # equal infinities are equal
    worst = float(np.max(error, initial=0))
    if worst <= budget:
        return Line(case, worst, budget)
    return Line(case, worst, budget, _where(y, wanted, ~(error <= budget)))


def _numbers(y):
    """What came as a float64 array; None where it holds no real numbers."""
    try:
        y = np.asarray(y)
        return y.astype(float) if y.dtype.kind in "biuf" else None
    except Exception:  # whatever a foreign array does when NumPy asks for its numbers
        return None


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
