"""Known mistakes: what a kernel that makes one would give, so that a check can name it.

A kernel is said to make a mistake when it equals that mistake's output, within the case's budget,
in every case that could be compared; right or wrong, so a mistake that shows only where n != m
must also be invisible elsewhere.
"""

import numpy as np

from refattn.verify.mistakes import of_others, of_softmax
from refattn.verify.mistakes.base import LINEAR, Mistake

__all__ = ["LINEAR", "MISTAKES", "Mistake", "equal_mistakes"]

MISTAKES = [*of_softmax.MISTAKES, *of_others.MISTAKES]


def equal_mistakes(mechanism, run, seen):
    """The mistakes that equal a kernel in every case; ``run`` is the right attention.

    ``seen`` has (y, wanted, budget, eps, q, k, v, options) for each case whose y has the right
    shape: float64 throughout, eps being that of the kernel's dtype.
    """
    found = []
    for mistake in MISTAKES:
        if mechanism in mistake.mechanisms and _explains(mistake, run, seen):
            found.append(mistake)
    return found


def _explains(mistake, run, seen):
    shown = False  # somewhere the mistake must differ from the truth
    for y, wanted, budget, eps, q, k, v, options in seen:
        try:
            with np.errstate(all="ignore"):
                output = mistake.output(run, q, k, v, options)
        except ValueError:  # the mistake does not fit these shapes
            output = None
        output = wanted if output is None else np.asarray(output, float)
        if output.shape != y.shape or not _equal(y, output, budget, eps):
            return False
        shown = shown or not _equal(output, wanted, budget, eps)
    return shown


def _equal(a, b, budget, eps):
    """Within the budget, and the rounding of an output larger than the truth."""
    with np.errstate(invalid="ignore", over="ignore"):
        same = (abs(a - b) <= budget + 4 * eps * abs(b)) | (a == b) | (np.isnan(a) & np.isnan(b))
    return bool(same.all())
