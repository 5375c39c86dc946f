"""An answer beside the right one: how far off, and where."""

import numpy as np

from refattn.verify.report import Line


def compare(case, y, wanted, budget, conditioning=None, trouble=""):
    """A line: how far y is from what was wanted, and what is wrong with it.

    ``trouble`` is what is already known to be wrong beside the numbers.
    """
    if y is None or y is ...:
        return Line(case, np.inf, budget, "gave nothing", conditioning)
    if isinstance(y, BaseException):
        words = str(y) if type(y).__name__ == "WrongKind" else f"raised {type(y).__name__}: {y}"
        return Line(case, np.inf, budget, words, conditioning)
    given, y = type(y).__name__, numbers(y)
    if y is None:
        return Line(case, np.inf, budget, f"gave {given}, expected real numbers", conditioning)
    if y.shape != wanted.shape:
        words = f"has shape {y.shape}, expected {wanted.shape}"
        return Line(case, np.inf, budget, words, conditioning)
    error = error_of(y, wanted)
    worst = float(np.max(error, initial=0))
    if not worst <= budget:
        trouble = _where(y, wanted, ~(error <= budget))
    return Line(case, worst, budget, trouble, conditioning)


def error_of(y, wanted):
    """|y - wanted|; infinities that agree are equal, and so are NaN."""
    with np.errstate(invalid="ignore"):
        return np.where((y == wanted) | (np.isnan(y) & np.isnan(wanted)), 0, abs(y - wanted))


def numbers(y):
    """What came as a float64 array; None where it holds no real numbers."""
    try:
        y = np.asarray(y)
        return y.astype(float) if y.dtype.kind in "biuf" or y.dtype.name == "bfloat16" else None
    except Exception:  # whatever a foreign array does when NumPy asks for its numbers
        return None


def _where(y, wanted, wrong):
    """Words for the place of the error: how many rows, which, and its first entry."""
    if wanted.ndim == 0:
        return f"gave {y:.12g}, expected {wanted:.12g}"
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    words = f"first at {at}: {y[at]:.6g}, expected {wanted[at]:.6g}"
    axis = max(0, wrong.ndim - 2)  # the rows; an array of one axis is a column
    rows = np.flatnonzero(wrong.any(axis=tuple(i for i in range(wrong.ndim) if i != axis)))
    total = wrong.shape[axis]
    if len(rows) < total:
        span = f"row {rows[0]}" if len(rows) == 1 else f"rows {rows[0]} to {rows[-1]}"
        words = f"{len(rows)} of {total} rows wrong, {span}; {words}"
    nan = int(np.isnan(y).sum())
    return f"{nan} of {y.size} are NaN; {words}" if nan else words
