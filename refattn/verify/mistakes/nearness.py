"""Whether a kernel's answers are those of a mistake, and not just within a wide budget of them."""

from dataclasses import dataclass

import numpy as np

from refattn.verify.compare import error_of

NEARER = 4.0  # times, to the mistake than to the truth
SHARE = 0.2  # how far the part of the mistake's change that is seen may be from 1
NOISE = 6.0  # standard errors of that part, which rounding may explain


@dataclass
class Nearness:
    """Squares of distances, summed over the cases, so that large numbers do not outweigh."""

    apart: float = 0.0  # over the size of the answers: of two tiny ones one may be nearer
    to_mistake: float = 0.0  # in budgets, where the mistake shows
    to_truth: float = 0.0  # likewise
    shown: bool = False

    @np.errstate(all="ignore")
    def add(self, y, output, wanted, eps):
        """Take in an array of a case; False where it rules the mistake out.

        ``output`` is None where the mistake says nothing, and the truth holds.
        """
        truth, budget = wanted.value, wanted.budget
        output = truth if output is None else output
        if output.shape != y.shape or not equal(y, output, widened(budget, output, truth), eps):
            return False
        if not y.size:
            return True
        off, whole = error_of(y, output), error_of(y, truth)
        self.apart += _mean_square(off, max(_largest(y), _largest(output)))
        if not equal(output, truth, budget, 0):
            self.shown = True
            self.to_mistake += _mean_square(off, budget)
            self.to_truth += _mean_square(whole, budget)
        return as_far(y, output, truth, eps)

    @property
    def explains(self):
        return self.shown and NEARER**2 * self.to_mistake <= self.to_truth

    @property
    def distance(self):
        return float(np.sqrt(self.apart))


def as_far(y, output, truth, eps):
    """Whether y lies as far from the truth as the mistake does, in the mistake's direction.

    y - truth is ``share`` times output - truth, in least squares, and a rest. Over many entries
    the rest averages out: a change far below the budget, or below the rounding of one entry, is
    told from one half as large.
    """
    told = np.isfinite(y) & np.isfinite(output) & np.isfinite(truth)
    change, error = (output - truth)[told], (y - truth)[told]
    unit = _largest(change) or 1.0  # squares may overflow
    change, error, base = change / unit, error / unit, truth[told] / unit
    square = change @ change
    if square <= (eps**2) * (base @ base):  # below the rounding of y
        return True
    share = error @ change / square
    rest = np.linalg.norm(error - share * change)
    # entries of a row share the rounding of its weights: they count as one
    spread = np.sqrt(rest**2 / square / max(1, len(change) // y.shape[-1]))
    return bool(abs(share - 1) <= SHARE + NOISE * spread)


def widened(budget, output, truth):
    """The budget, as many times as large as the mistake's output is larger than the truth."""
    top, base = _largest(output), _largest(truth)
    return budget * max(1.0, top / base) if base else budget


def _mean_square(x, unit):
    """Infinite where an entry is NaN."""
    mean = np.mean((x / (unit or 1.0)) ** 2)
    return np.inf if np.isnan(mean) else mean


def _largest(x):
    return float(np.max(abs(x[np.isfinite(x)]), initial=0.0))


def equal(a, b, budget, eps):
    """Within the budget, and the rounding of an output larger than the truth."""
    with np.errstate(invalid="ignore", over="ignore"):
        same = (abs(a - b) <= budget + 4 * eps * abs(b)) | (a == b) | (np.isnan(a) & np.isnan(b))
    return bool(same.all())
