"""The check itself: a kernel on cases, or an answer beside the right one."""

import contextlib
import signal
import threading
from dataclasses import replace

import numpy as np

import refattn
from refattn import checks
from refattn.verify.cases import (
    CASES,
    FAINT,
    cast,
    eps_of,
    inputs_of,
    number_type,
    truth_and_budget,
)
from refattn.verify.like import CONVENTIONS, aligned, called_like
from refattn.verify.mistakes import LINEAR, equal_mistakes
from refattn.verify.report import Line, Report


def check(
    kernel,
    mechanism,
    *,
    dtype="float32",
    cases="default",
    title=None,
    hint="",
    like=None,
    time_limit=60.0,
    **options,
):
    r"""Hold ``kernel(q, k, v)`` against one of refattn's attentions.

    The truth is the formula in float64 on the same rounded inputs. A kernel passes when

    .. math:: |error| \le 2 E + 4\, \mathrm{eps}\, (1 + \max|s|) \max|v|

    with E the error of refattn's own formula in the kernel's dtype (float16 and bfloat16 are
    computed in float32 and rounded once) and s the logits.

    Parameters
    ----------
    kernel : callable
        ``kernel(q, k, v) -> y`` on one head, arrays (n, d), (m, d), (m, e) to (n, e), with the
        options built in.
    mechanism : str or function
        The attention to be equal to, such as "local_attention".
    dtype : {"float32", "float64", "float16", "bfloat16"}
        What the kernel is given, and should give back.
    cases : {"default", "square"}
        "square" leaves out the cases with n != m.
    title : str, optional
        The name in the report; the kernel's own if None.
    hint : str
        What to say while the kernel is an unfilled hole, one that returns None or ``...``.
    like : {"torch"}, optional
        The library that the kernel is written in: it is called with that library's arrays, in its
        layout, and judged by its conventions (``refattn.verify.like``). For torch: tensors
        (1, 1, n, d), and causal aligned at the first key.
    time_limit : float
        Seconds for one case; a kernel that takes longer is interrupted (where signals can be used:
        in the main thread of a Unix process).
    **options
        The mechanism's options, real arrays rounded to ``dtype``. Where an array fixes n, m or d,
        the cases take those sizes.

    Returns
    -------
    Report
        Whatever the kernel does ends as a line of the report: an exception, another shape or
        dtype, NaN, writing to its inputs, giving one of them back, or taking too long. Its
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
    kernel = called_for(kernel, like)
    if like is not None and name == "softmax_attention":
        truth = aligned(truth)
        options["top_left"] = CONVENTIONS[like].top_left
    dtype = number_type(dtype)
    options = {name: cast(value, dtype) for name, value in options.items()}
    lines, seen = [], []
    wide = {name: cast(value, np.float64) for name, value in options.items()}
    faint = FAINT if name in LINEAR else {}
    for case, q, k, v in inputs_of({**CASES, **faint}, cases, dtype, options):
        wanted, budget = truth_and_budget(truth, q, k, v, options, wide)
        if wanted is None:
            continue
        y, trouble = _call(kernel, q, k, v, time_limit)
        if y is None or y is ...:
            return Report(title, hint=hint)
        line = compare(case, y, wanted, budget)
        lines.append(line if line.trouble else replace(line, trouble=trouble))
        y = _numbers(y)
        if y is not None and y.shape == wanted.shape:
            inputs = (x.astype(float) for x in (q, k, v))
            seen.append((y, wanted, budget, eps_of(q.dtype), *inputs, wide))
    if not lines:
        raise ValueError(f"no case fits the shapes of the options {sorted(options)}")
    return Report(title, lines, diagnosis=_diagnosis(name, truth, lines, seen))


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
    return Report(title, [compare(title, answer, np.asarray(wanted), tolerance)])


def called_for(kernel, like):
    """The kernel on NumPy arrays (n, d), whatever its library is."""
    if like is None:
        return kernel
    checks.choice("like", like, tuple(CONVENTIONS))
    return called_like(kernel, CONVENTIONS[like])


def _diagnosis(mechanism, run, lines, seen):
    """The known mistakes that the kernel equals, each in a sentence; empty if all is right."""
    if not any(line.trouble for line in lines):
        return ()
    return tuple(f"{m.name}: {m.tells}" for m in equal_mistakes(mechanism, run, seen))


def _call(kernel, q, k, v, time_limit):
    """The kernel's answer, or what it raised; and what is wrong with it beside its numbers."""
    given = [x.copy() for x in (q, k, v)]
    try:
        with _time_limit(time_limit):
            y = kernel(*given)
    except Exception as error:
        return error, ""
    for name, x, kept in zip("qkv", given, (q, k, v), strict=True):
        if not np.array_equal(x.view(np.uint8), kept.view(np.uint8)):
            return y, f"wrote to its input {name}"
        if isinstance(y, np.ndarray) and np.shares_memory(y, x):
            return y, f"gave a view of its input {name}, expected an array of its own"
    if isinstance(y, np.ndarray) and y.dtype != q.dtype:
        return y, f"gave {y.dtype}, expected {q.dtype}"
    return y, ""


@contextlib.contextmanager
def _time_limit(seconds):
    """TimeoutError after so many seconds, where a signal can be had."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(number, frame):
        raise TimeoutError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compare(case, y, wanted, budget):
    """A line: how far y is from what was wanted, and what is wrong with it."""
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
        return y.astype(float) if y.dtype.kind in "biuf" or y.dtype.name == "bfloat16" else None
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
