"""Softmax attention with other weights: scores at another scale, a key left out, no weights.

Each ``give(part)`` is what y would be then, (..., n, e); those of OF_SOFTMAX, and ``rescaled``, for
parts that are the softmax of the scores that are seen.
"""

import numpy as np

from refattn.verify.findings.multiples import CERTAIN, digits, of_sizes, uncertainty
from refattn.verify.findings.parts import MODERATE, products_of, top_score
from refattn.verify.findings.precision import BITS, lower_types, nearest

STARTS = (1.0, 0.5, 2.0, -1.0, 0.1, 10.0)  # where the search for a factor begins
STEPS = 20
FEW = 3  # cases that a factor is estimated in, the smallest
MOST_SCORES = 2**17
NAMED = {"log2(e), as if exp were taken for exp2": 1 / np.log(2)}


def softmax_of(part, factor=1.0, left_out=None, bits=None):
    """y and its derivative by ``factor`` on q . k, from the scores that are seen; without a key,
    or from q, k and v of so many bits."""
    products, v = part.products, part.seen.trial.v.astype(float)
    if bits is not None:
        v, products = nearest(v, bits), products_of(part.seen, lambda x: nearest(x, bits))
    s = np.where(part.visible, factor * products + part.bias, -np.inf)
    if left_out is not None:
        s[..., left_out] = -np.inf
    top = s.max(axis=-1, keepdims=True, initial=-np.inf)
    a = np.exp(s - np.where(np.isfinite(top), top, 0))
    total = a.sum(axis=-1, keepdims=True)
    p = a / np.where(total == 0, 1, total)
    slope = p * (products - (p * products).sum(axis=-1, keepdims=True))
    return p @ v, slope @ v


def is_softmax(part):
    """Whether the right y is the softmax of the visible scores, times v."""
    if part.name != "y" or part.visible is None or not part.visible.shape[-1]:
        return False
    return bool((abs(softmax_of(part)[0] - part.wanted) <= part.budget).all())


def _mean_of_all(part):
    v = part.seen.trial.v.astype(float)
    return np.broadcast_to(v.mean(axis=-2, keepdims=True), part.y.shape) if v.size else None


def _mean_of_seen(part):
    return None if part.bias.any() else softmax_of(part, factor=0.0)[0]


def _best_key(part):
    v, best = part.seen.trial.v.astype(float), part.scores.argmax(axis=-1)[..., None]
    taken = np.take_along_axis(v, np.broadcast_to(best, part.y.shape), axis=-2)
    return np.where(part.visible.any(axis=-1, keepdims=True), taken, 0)


def _rounded_first(name):
    """q, k and v in a lower type, the arithmetic not."""

    def give(part):
        return softmax_of(part, bits=BITS[name])[0] if name in lower_types(part) else None

    return give


VALUES = {
    "v itself": lambda part: part.seen.trial.v.astype(float),
    "the mean of all values in every row": _mean_of_all,
}
OF_SOFTMAX = {
    "the mean of the values that each row sees: its weights are all the same": _mean_of_seen,
    "in each row the value of the key with the largest score: one weight is 1": _best_key,
    "what is wanted without the first key": lambda part: softmax_of(part, left_out=0)[0],
    "what is wanted without the last key": lambda part: softmax_of(part, left_out=-1)[0],
    **{f"what is wanted with q, k and v rounded to {name}": _rounded_first(name) for name in BITS},
}


def rescaled(failing):
    """Scores multiplied by a constant, or by what the sizes give."""
    told = [part for part in failing if 0 < top_score(part.seen) < MODERATE]
    told = sorted(told, key=lambda part: part.scores.size)[:FEW]
    fits = []
    for part in told:
        fit = _factor(part) if part.scores.size < MOST_SCORES else None
        if fit is None:
            return ""
        fits.append(fit)
    if not fits:
        return ""
    factors, slack = np.array(fits).T
    surest = int(slack.argmin())
    if slack[surest] > CERTAIN * abs(factors[surest]):
        return ""
    constant, number = factors[surest], digits(factors[surest], slack[surest])
    for name, known in NAMED.items():
        if abs(known - constant) <= slack[surest]:
            constant, number = known, name
    guesses = {number: lambda part: constant} | of_sizes(told, factors, slack)
    for name, give in guesses.items():
        if all(part.explained(softmax_of(part, give(part))[0]) for part in failing):
            return f"what is wanted with q . k times {name}"
    return ""


def _factor(part):
    """The factor on q . k that gives y, and how far it may be off: Gauss-Newton steps."""
    for factor in STARTS:
        for _ in range(STEPS):
            y, slope = softmax_of(part, factor)
            square = (slope * slope).sum()
            if square == 0 or not np.isfinite(square):
                break
            step = np.clip(((part.y - y) * slope).sum() / square, -1.0, 1.0)
            factor += step
            if abs(step) < 1e-12:
                break
        if square > 0 and part.explained(softmax_of(part, factor)[0]):
            return factor, uncertainty(part, part.y - y, square, factor)
    return None
