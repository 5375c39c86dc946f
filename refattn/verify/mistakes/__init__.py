"""Known mistakes: what a kernel that makes one would give, so that a check can name it.

A kernel is said to make a mistake when it equals that mistake's output, within the case's budget,
in every case that could be compared; right or wrong, so a mistake that shows only where n != m
must also be invisible elsewhere. In half precision a budget has room for several mistakes: the
kernel must also be far nearer to this one than to the truth, and off by as much as it
(``nearness.py``).
"""

from dataclasses import replace

import numpy as np

from refattn.verify.mistakes import (
    of_gradients,
    of_heads,
    of_linear,
    of_others,
    of_softmax,
    of_windows,
)
from refattn.verify.mistakes.base import LINEAR, Mistake
from refattn.verify.mistakes.heads import head_by_head
from refattn.verify.mistakes.nearness import Nearness, equal

__all__ = ["GRADIENT_MISTAKES", "LINEAR", "MISTAKES", "Mistake", "equal_mistakes", "output_of"]

MISTAKES = [
    mistake
    for module in (of_softmax, of_windows, of_linear, of_others, of_heads)
    for mistake in module.MISTAKES
]
GRADIENT_MISTAKES = of_gradients.MISTAKES
AS_NEAR = 4.0  # of the mistakes that explain a kernel, those at most so many times as far as one


def equal_mistakes(mechanism, reference, seen):
    """The mistakes that equal a kernel in every case, and none is much nearer to it.

    ``reference`` is the right attention; ``seen`` has trial, options, wanted, got and eps of each
    case that could be compared. Where every y is right, the mistakes of gradients. Those of one
    name that differ in a number are one.
    """
    right = all("y" in x.got and _right(x.got["y"], x.wanted["y"]) for x in seen)
    catalogue = GRADIENT_MISTAKES if right else MISTAKES
    parts = ("dq", "dk", "dv") if right else ("y",)
    seen = [x for x in seen if all(part in x.got for part in parts)]
    found = {}
    for mistake in catalogue:
        if mechanism in mistake.mechanisms:
            distance = _distance(mistake, reference, seen, parts)
            if distance is not None:
                found[mistake] = distance
    best = min(found.values(), default=0.0)
    return _joined({m: far for m, far in found.items() if far <= AS_NEAR * best})


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


def _right(y, wanted):
    return equal(y, wanted.value, wanted.budget, 0)


def _distance(mistake, reference, seen, parts):
    """How far the kernel is from the mistake, relatively; None where it does not make it."""
    near = Nearness()
    for x in seen:
        outputs = output_of(mistake, reference, x.trial, x.options)
        for i, part in enumerate(parts):
            output = None if outputs is None else _in_range(outputs[i], x.trial.q.dtype)
            if not near.add(x.got[part], output, x.wanted[part], x.eps):
                return None
    return near.distance if near.explains else None


def _in_range(output, dtype):
    """In float64, and infinite where the kernel's dtype has no number so large."""
    output = np.asarray(output, float)
    with np.errstate(over="ignore"):
        return np.where(np.isinf(output.astype(dtype)), np.copysign(np.inf, output), output)


def _joined(found):
    """One entry of each name and number: the nearest, with all the numbers that fit."""
    by_name = {}
    for mistake in sorted(found, key=found.get):
        by_name.setdefault(mistake.name, []).append(mistake)
    kept = {}
    for name, (nearest, *others) in by_name.items():
        numbers = [m.number for m in MISTAKES if m in (nearest, *others) and m.number]
        tells = nearest.tells
        if len(numbers) > 1:
            *ahead, last = numbers
            tells = tells.replace(nearest.number, f"{', '.join(ahead)} or {last}", 1)
        kept[name] = replace(nearest, tells=tells)
    return [kept.pop(m.name) for m in found if m.name in kept]
