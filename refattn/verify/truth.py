"""What a kernel should give on a case, in float64, and how far off it may be."""

from dataclasses import dataclass

import numpy as np

from refattn import checks
from refattn.verify.cases import eps_of
from refattn.verify.rounding import every_operation_rounded

GRADIENTS = ("dq", "dk", "dv")
NUDGE = 2.0**-26  # relative change of the inputs that measures conditioning


@dataclass(frozen=True)
class Wanted:
    """One array: its value, the largest error that is right, and its conditioning.

    ``conditioning`` is the relative change of the array's largest entry over a relative change
    of the inputs, for one draw of signs.
    """

    value: np.ndarray
    budget: float
    conditioning: float


def truth_of(reference, trial, low, wide, gradients):
    """{"y": Wanted} and, with ``gradients``, {"dq", "dk", "dv"}; ``low`` and ``wide`` are the
    options rounded to the kernel's dtype and those in float64.

    ValueError where the case does not fit the mechanism.
    """
    q, k, v = trial.inputs
    arrays = (*trial.inputs, trial.dy)
    exact = _run(reference, [x.astype(np.float64) for x in arrays], wide, gradients)
    own_error = _own_error(reference, arrays, low, gradients, exact)
    signs = np.random.default_rng(0)
    nudged = [x.astype(float) * (1 + NUDGE * signs.choice([-1, 1], x.shape)) for x in arrays]
    moved = _run(reference, nudged, wide, gradients)
    eps = eps_of(q.dtype)
    logits = 1 + (_largest_score(q, k, wide) if reference.has_scores else 0)
    sizes = _magnitudes(trial, wide, exact)
    wanted = {}
    for name, value in exact.items():
        size, floor = sizes[name]
        budget = 2 * own_error[name] + 4 * eps * (logits * size + floor)
        change = _largest(moved[name] - value) / (NUDGE * (_largest(value) or 1.0))
        wanted[name] = Wanted(value, budget, change)
    return wanted


def _run(reference, arrays, options, gradients):
    q, k, v, dy = arrays
    answers = {"y": reference.forward(q, k, v, **options)}
    if gradients:
        grads = reference.vjp(dy, q, k, v, **options)[:3]
        answers |= dict(zip(GRADIENTS, grads, strict=True))
    return {name: np.asarray(x) for name, x in answers.items()}


def _own_error(reference, arrays, options, gradients, exact):
    """The error of refattn's formula in the kernel's dtype; for half types the larger of rounding
    once and rounding every operation, which may overflow and then says nothing."""
    dtype = arrays[0].dtype
    runs = [_run(reference, arrays, options, gradients)]
    if checks.compute_dtype(dtype) != dtype:
        with every_operation_rounded(dtype):
            runs.append(_run(reference, arrays, options, gradients))
    found = dict.fromkeys(exact, 0.0)
    for run in runs:
        for name, x in run.items():
            error = _largest(x.astype(float) - exact[name])
            found[name] = max(found[name], error if np.isfinite(error) else 0.0)
    return found


def _largest_score(q, k, options):
    """The largest |logit|, bias included."""
    scale = checks.scale(options.get("scale"), q.shape[-1])
    logits = _largest(scale * (q.astype(float) @ k.astype(float).mT))
    bias = np.asarray(options.get("bias") if options.get("bias") is not None else 0.0, float)
    return logits + _largest(bias[np.isfinite(bias)])


def _magnitudes(trial, options, exact):
    """For each array the size that the logits' rounding acts on, and a floor for what cancels.

    The output is an average of values. A gradient of scores is P (dP - sum P dP), whose two terms
    may cancel: each has the size of dP = dy v^T.
    """
    q, k, v, dy = (x.astype(float) for x in (*trial.inputs, trial.dy))
    pull = abs(checks.scale(options.get("scale"), q.shape[-1])) * _largest(dy @ v.mT)
    sizes = {"y": (max(_largest(v), _largest(exact["y"])), 0.0)}
    floors = {"dq": _largest(k) * pull, "dk": _largest(q) * pull, "dv": _largest(dy)}
    for name, floor in floors.items():
        if name in exact:
            sizes[name] = (_largest(exact[name]), floor)
    return sizes


def _largest(x):
    """The largest |entry|, NaN aside; 0 of nothing."""
    x = abs(x[~np.isnan(x)])
    return float(x.max(initial=0))
