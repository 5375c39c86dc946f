"""Known mistakes: what a kernel that makes one would give, so that a check can name it.

A kernel is said to make a mistake when it equals that mistake's output, within the case's budget,
in every case that could be compared; right or wrong, so a mistake that shows only where n != m
must also be invisible elsewhere.
"""

import numpy as np

from refattn.verify.mistakes import of_gradients, of_heads, of_linear, of_others, of_softmax
from refattn.verify.mistakes.base import LINEAR, Mistake
from refattn.verify.mistakes.heads import head_by_head

__all__ = ["GRADIENT_MISTAKES", "LINEAR", "MISTAKES", "Mistake", "equal_mistakes", "output_of"]

MISTAKES = [
    mistake
    for module in (of_softmax, of_linear, of_others, of_heads)
    for mistake in module.MISTAKES
]
GRADIENT_MISTAKES = of_gradients.MISTAKES


def equal_mistakes(mechanism, reference, seen):
    """The mistakes that equal a kernel in every case.

    ``reference`` is the right attention; ``seen`` has trial, options, wanted, got and eps of each
    case that could be compared. Where every y is right, the mistakes of gradients.
    """
    right = all(
        equal(x.got["y"], x.wanted["y"].value, x.wanted["y"].budget, 0) for x in seen if x.got
    )
    catalogue = GRADIENT_MISTAKES if right else MISTAKES
    parts = ("dq", "dk", "dv") if right else ("y",)
    seen = [x for x in seen if all(part in x.got for part in parts)]
    return [
        mistake
        for mistake in catalogue
        if mechanism in mistake.mechanisms and _explains(mistake, reference, seen, parts)
    ]


def output_of(mistake, reference, trial, options):
    """What the mistake gives on a case, a tuple of arrays; None where it says nothing."""
    wide = [x.astype(float) for x in (trial.dy, *trial.inputs)]
    try:
        with np.errstate(all="ignore"):
            if mistake in GRADIENT_MISTAKES:
                run, arrays = reference.vjp, wide
            else:
                run, arrays = reference.forward, wide[1:]
            output = mistake.output if mistake.across_heads else head_by_head(mistake.output)
            found = output(run, *arrays, options)
    except ValueError:  # the mistake does not fit these shapes
        return None
    return found if found is None or isinstance(found, tuple) else (found,)


def _explains(mistake, reference, seen, parts):
    shown = False  # somewhere the mistake must differ from the truth
    for x in seen:
        outputs = output_of(mistake, reference, x.trial, x.options)
        for i, part in enumerate(parts):
            wanted, budget = x.wanted[part].value, x.wanted[part].budget
            output = wanted if outputs is None else np.asarray(outputs[i], float)
            y = x.got[part]
            if output.shape != y.shape or not equal(y, output, budget, x.eps):
                return False
            shown = shown or not equal(output, wanted, budget, x.eps)
    return shown


def equal(a, b, budget, eps):
    """Within the budget, and the rounding of an output larger than the truth."""
    with np.errstate(invalid="ignore", over="ignore"):
        same = (abs(a - b) <= budget + 4 * eps * abs(b)) | (a == b) | (np.isnan(a) & np.isnan(b))
    return bool(same.all())
