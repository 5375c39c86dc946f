"""Probes that need no reference: what must hold for a kernel whatever its formula is."""

import numpy as np

from refattn import checks
from refattn.verify.cases import eps_of, number_type
from refattn.verify.check import called_for, compare
from refattn.verify.report import Report

N, D = 24, 8


def probe(
    kernel, *, causal=False, window=None, linear=True, dtype="float32", like=None, title=None
):
    """Perturb the inputs of ``kernel(q, k, v)`` and see that what must stay the same does.

    Parameters
    ----------
    kernel : callable
        ``kernel(q, k, v) -> y`` on one head, (24, 8) each.
    causal : bool
        Query i sees keys j <= i only: later keys and values are made huge, and NaN.
    window : int or (int, int), optional
        Keys out of each query's window are made NaN.
    linear : bool
        Whether the output is linear in v, as that of any attention with weights is.
    dtype : {"float32", "float64", "float16", "bfloat16"}
    like : {"torch"}, optional
        As in ``check``.
    title : str, optional
        The name in the report; the kernel's own if None.

    Returns
    -------
    Report
        A line for each probe: "same again" (two calls, one answer, to the bit), "finite",
        "linear in v", "keys shuffled" and "queries shuffled" (neither causal nor windowed),
        "later keys x 1e5", "later keys NaN" and "far keys, later near" (causal), "keys out of
        window NaN".

    Raises
    ------
    ValueError
        Unknown dtype or library.

    Examples
    --------
    A cumulative form that divides by the sum over all keys sees the future:

    >>> import numpy as np
    >>> def kernel(q, k, v):
    ...     a = np.tril(np.exp(q @ k.T))
    ...     return (a @ v) / np.exp(q @ k.T).sum(axis=1, keepdims=True)
    >>> report = probe(kernel, causal=True)
    >>> [line.case for line in report.lines if line.trouble]
    ['later keys x 1e5', 'later keys NaN', 'far keys, later near']
    """
    checks.flag("causal", causal)
    dtype = number_type(dtype)
    run = called_for(kernel, like)
    rng = np.random.default_rng(0)
    q, k, v, w = (rng.standard_normal((N, D)).astype(dtype) for _ in range(4))
    title = title or getattr(kernel, "__name__", type(kernel).__name__)
    y = run(q, k, v)
    if y is None or y is ...:
        return Report(title, hint="The kernel returned nothing.")
    first = compare("finite", y, np.zeros((N, D)), np.inf)
    if first.trouble:
        return Report(title, [first])
    y = np.asarray(y).astype(float)
    # The same sums in another order: a few eps of their size for each term.
    budget = 8 * N * eps_of(dtype) * abs(v.astype(float)).max()
    lines = [first, compare("same again", run(q, k, v), y, 0.0)]
    if linear:
        mixed = (2 * v.astype(float) - 3 * w.astype(float)).astype(dtype)
        wanted = 2 * y - 3 * np.asarray(run(q, k, w)).astype(float)
        lines.append(compare("linear in v", run(q, k, mixed), wanted, 16 * budget))
    if not causal and window is None:
        order = rng.permutation(N)
        lines.append(compare("keys shuffled", run(q, k[order], v[order]), y, budget))
        lines.append(compare("queries shuffled", run(q[order], k, v), y[order], budget))
    if causal:
        for case, factor in (("later keys x 1e5", 1e5), ("later keys NaN", np.nan)):
            lines.append(_future(case, run, q, k, v, y, budget, factor))
        # A maximum over all keys underflows the far ones once a later key comes near.
        far = (30 * k.astype(float)).astype(dtype)
        with np.errstate(all="ignore"):
            at_far = np.asarray(run(q, far, v)).astype(float)
        lines.append(_future("far keys, later near", run, q, far, v, at_far, budget, 1e-5))
    if window is not None:
        left, right = checks.window(window, causal)
        lines.append(_outside(run, q, k, v, y, budget, left, right))
    return Report(title, lines)


def _future(case, run, q, k, v, y, budget, factor):
    """Change what comes after position i, for several i: rows up to i must stay."""
    lines = []
    for i in (0, 1, N // 2, N - 2):
        later = np.arange(N)[:, None] > i
        with np.errstate(all="ignore"):
            bad = [np.where(later, x * x.dtype.type(factor), x).astype(x.dtype) for x in (k, v)]
        lines.append(_stays(case, run, q, bad, y, budget, slice(0, i + 1)))
    return _worst(lines)


def _outside(run, q, k, v, y, budget, left, right):
    """NaN everywhere that query i may not see, for several i: its row must stay."""
    lines = []
    for i in (0, N // 2, N - 1):
        j = np.arange(N)[:, None]
        out = (j < i - left) | (j > i + right)
        bad = [np.where(out, np.nan, x).astype(x.dtype) for x in (k, v)]
        rows = slice(i, i + 1)
        lines.append(_stays("keys out of window NaN", run, q, bad, y, budget, rows))
    return _worst(lines)


def _stays(case, run, q, bad, y, budget, rows):
    """A line on these rows of the answer to changed keys and values."""
    with np.errstate(all="ignore"):
        again = run(q, *bad)
    return compare(case, _rows(again, rows), y[rows], budget)


def _worst(lines):
    """The first line with trouble, or else the one with the largest error."""
    return max(lines, key=lambda line: (bool(line.trouble), 0 if line.trouble else line.error))


def _rows(y, rows):
    """Some rows of an answer; what is no array is left for the comparison to refuse."""
    return y[rows] if isinstance(y, np.ndarray) and y.ndim == 2 else y
