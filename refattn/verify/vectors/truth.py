"""What a vector wants, and how far off a kernel may be: the one place that both come from."""

from decimal import ROUND_UP, Context
from typing import NamedTuple

import numpy as np

from refattn.verify.certain import answers
from refattn.verify.vectors.call import answers_of
from refattn.verify.wanted import budgets


class Wanted(NamedTuple):
    value: np.ndarray
    error: float
    budget: float


def wanted_of(mechanism, inputs, options):
    """{"y": Wanted, ...} of inputs and options as they are stored."""
    plain = as_attention(mechanism, inputs, options)
    exact = answers(*plain)
    values = {part: value for part, (value, _) in exact.items()}
    budget = budgets(_run(plain[0]), *plain, values)
    found = {}
    for part, (value, bound) in exact.items():
        error = float(np.max(bound, initial=0))
        if not error <= budget[part]:
            raise ValueError(
                f"{mechanism}: {part} is known to {error:.1e}, a kernel to {budget[part]:.1e}; "
                "expected another case"
            )
        if mechanism in ("merge_attention", "linear_attention_step"):
            value = _of_one(part, value)
        # Adding 0 makes -0 one; what is stored may itself be off by ``error``.
        most = _rounded_up(budget[part] + error)
        found[part] = Wanted(np.asarray(value, float) + 0.0, _rounded_up(error), most)
    return found


def _rounded_up(x):
    """To three digits.

    >>> _rounded_up(1.2301e-7), _rounded_up(0.0)
    (1.24e-07, 0.0)
    """
    return float(Context(prec=3, rounding=ROUND_UP).create_decimal_from_float(x))


def _run(mechanism):
    def run(inputs, options):
        with np.errstate(all="ignore"):
            return answers_of(mechanism, inputs, options)

    return run


def as_attention(mechanism, inputs, options):
    """The same as (mechanism, inputs, options) of an attention.

    A step is a causal form of one position. Merging parts is attention of one query, 1, whose keys
    are the parts' log-sum-exps.
    """
    if mechanism == "linear_attention_step":
        rows = {name: x[..., None, :] for name, x in inputs.items()}
        return "linear_attention", rows, {**options, "causal": True, "return_state": True}
    if mechanism != "merge_attention":
        return mechanism, inputs, options
    lses, ys = (np.moveaxis(inputs[name], 0, axis) for name, axis in (("lses", -1), ("ys", -2)))
    seen = lses > -np.inf  # (..., n, parts)
    rows = {
        "q": np.ones((*lses.shape[:-1], 1, 1), lses.dtype),
        "k": np.where(seen, lses, 0).astype(lses.dtype)[..., None],
        "v": np.where(seen[..., None], ys, 0).astype(ys.dtype),
    }
    return (
        "softmax_attention",
        rows,
        {
            "mask": seen[..., None, :],
            "scale": 1.0,
            "return_lse": True,
        },
    )


def _of_one(part, value):
    """Without the axis of the one query."""
    return {"y": lambda: value[..., 0, :], "lse": lambda: value[..., 0]}.get(part, lambda: value)()
