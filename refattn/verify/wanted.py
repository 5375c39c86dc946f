"""What a kernel should give on a case, in float64, and how far off it may be."""

from dataclasses import dataclass

import numpy as np

from refattn import checks
from refattn.verify.cases import cast, eps_of
from refattn.verify.rounding import every_operation_rounded
from refattn.verify.visible import visible

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


def wanted_of(reference, trial, low, wide, gradients):
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
    logits = 1 + largest_logit(reference.mechanism, q.astype(float), k.astype(float), wide, eps)
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
    """The error of refattn's formula in the kernel's dtype.

    For half types the larger of rounding once and rounding every operation, which may overflow and
    then says nothing. For float64, in which the truth itself is computed, the error in float32
    times the ratio of the two types' eps.
    """
    dtype = arrays[0].dtype
    runs = [(_run(reference, arrays, options, gradients), 1.0)]
    if checks.compute_dtype(dtype) != dtype:
        with every_operation_rounded(dtype):
            runs.append((_run(reference, arrays, options, gradients), 1.0))
    elif dtype == np.float64:
        narrow = [x.astype(np.float32) for x in arrays]
        low = {name: cast(x, np.float32) for name, x in options.items()}
        with np.errstate(all="ignore"):
            same = _run(reference, [x.astype(float) for x in narrow], _wide(low), gradients)
            rough = _run(reference, narrow, low, gradients)
        rough = {name: x - same[name] + exact[name] for name, x in rough.items()}
        runs.append((rough, 2.0**-29))
    found = dict.fromkeys(exact, 0.0)
    for run, factor in runs:
        for name, x in run.items():
            error = factor * _largest(x.astype(float) - exact[name])
            found[name] = max(found[name], error if np.isfinite(error) else 0.0)
    return found


def _wide(options):
    return {name: cast(x, np.float64) for name, x in options.items()}


def largest_logit(mechanism, q, k, options, eps):
    """max|s| over the visible pairs; a bias far below its row's largest score hides a pair too.

    Of Linformer, those of the projected keys; of linear attention 0, which has none.
    """
    if mechanism == "gated_attention":
        mechanism = getattr(options.get("attention"), "__name__", "softmax_attention")
    if mechanism.startswith("linear_"):
        return 0.0
    scale = checks.scale(options.get("scale"), q.shape[-1])
    if mechanism == "linformer_attention":
        k = np.asarray(options["E"], float) @ _hidden_as_zero(k, options.get("key_mask"))
    s = scale * (q @ k.mT)
    if options.get("softcap"):
        s = options["softcap"] * np.tanh(s / options["softcap"])
    if options.get("bias") is not None:
        s = s + options["bias"]
    if mechanism in ("softmax_attention", "local_attention", "sparse_attention"):
        s = np.where(visible(q.shape[-2], k.shape[-2], options), s, -np.inf)
    counts = s > -np.inf
    if options.get("bias") is not None:  # -1e9 hides a pair as well, and is no logit
        top = s.max(axis=-1, keepdims=True, initial=-np.inf)
        with np.errstate(invalid="ignore"):
            counts = counts & (s - top >= 2 * np.log(eps))
    return _largest(np.where(counts, s, 0.0))


def _hidden_as_zero(k, key_mask):
    return k if key_mask is None else np.where(np.asarray(key_mask)[..., None], k, 0)


def _magnitudes(trial, options, exact):
    """For each array the size that the logits' rounding acts on, and a floor for what cancels.

    The output is an average of values, or a sum of them where nothing is divided: the larger of
    max|v| and max|y|. A gradient of scores is P (dP - sum P dP), whose two terms
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
