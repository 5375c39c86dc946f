"""One array of one case, beside what it should be: what findings are made from."""

import functools
from dataclasses import dataclass

import numpy as np

from refattn import checks
from refattn.verify.compare import error_of
from refattn.verify.visible import visible

MOST_PAIRS = 2**22  # more pairs of a query and a key than this are not looked at one by one
MODERATE = 50.0  # scores beyond it multiply every error
ENOUGH = 8  # entries that a guess must explain and the right array does not
NEARER = 4.0  # a guess must be this much nearer to what came than the right array is


@dataclass(frozen=True)
class Part:
    """y or a gradient of a case that the kernel answered, (..., rows, columns) in float64.

    ``seen`` is the case as ``refattn.verify.check`` keeps it. ``wrong`` marks the entries beyond
    the budget, NaN among them.
    """

    name: str
    seen: object

    @property
    def y(self):
        return self.seen.got[self.name]

    @property
    def wanted(self):
        return self.seen.wanted[self.name].value

    @property
    def budget(self):
        return self.seen.wanted[self.name].budget

    @functools.cached_property
    def error(self):
        return error_of(self.y, self.wanted)

    @functools.cached_property
    def wrong(self):
        return ~(self.error <= self.budget)

    @property
    def failed(self):
        return bool(self.wrong.any())

    @property
    def wrong_rows(self):
        """(rows,): whether a row is wrong in any head."""
        return self.wrong.any(axis=(*range(self.wrong.ndim - 2), -1))

    @property
    def wrong_columns(self):
        """(columns,): whether a column is wrong in any head."""
        return self.wrong.any(axis=tuple(range(self.wrong.ndim - 1)))

    @functools.cached_property
    def region(self):
        """The rows with a wrong entry, in the columns with one."""
        wrong = self.wrong
        return wrong.any(axis=-1, keepdims=True) & wrong.any(axis=-2, keepdims=True)

    @functools.cached_property
    def over(self):
        """The largest error over the budget: inf where it is NaN, or the budget is 0."""
        worst = float(np.max(self.error, initial=0))
        if worst == 0:
            return 0.0
        return worst / self.budget if worst < np.inf and self.budget > 0 else np.inf

    @functools.cached_property
    def visible(self):
        """(..., n, m): who sees whom by mask, window and causal; None where that is not known."""
        q, k, _ = self.seen.trial.inputs
        if q.size // q.shape[-1] * k.shape[-2] > MOST_PAIRS:
            return None
        try:
            return visible(q.shape[-2], k.shape[-2], self.seen.options)
        except (TypeError, ValueError):
            return None

    @functools.cached_property
    def products(self):
        """(..., n, m): scale q . k."""
        return products_of(self.seen)

    @property
    def bias(self):
        """What is added to the products, broadcasting to them."""
        bias = self.seen.options.get("bias")
        return np.zeros(()) if bias is None else np.asarray(bias, float)

    @functools.cached_property
    def scores(self):
        """(..., n, m): products + bias where seen, -inf elsewhere; None where that is not known."""
        if self.visible is None:
            return None
        return np.where(self.visible, self.products + self.bias, -np.inf)

    def explained(self, guess, told=None, budget=None):
        """Whether ``guess`` is what came where ``told`` is True: within the budget and the
        rounding of what came, and NEARER than the right array."""
        told = np.ones(self.y.shape, bool) if told is None else told
        budget = self.budget if budget is None else np.broadcast_to(budget, self.y.shape)[told]
        y, guess, error = self.y[told], guess[told], self.error[told]
        with np.errstate(invalid="ignore"):
            off = np.where(y == guess, 0, abs(y - guess))
            near = (off <= budget + 4 * self.seen.eps * abs(guess)).all()
        return bool(near and off.max(initial=0) * NEARER <= error.max(initial=0))

    def told_apart(self, guess, told):
        """The entries, where ``told`` is True, by which a guess differs from the right array."""
        with np.errstate(invalid="ignore"):
            return int((told & ~(abs(guess - self.wanted) <= 2 * self.budget)).sum())


def products_of(seen, rounded=lambda x: x):
    """(..., n, m): scale q . k of a case, of rounded q and k."""
    q, k = (rounded(x.astype(float)) for x in seen.trial.inputs[:2])
    return checks.scale(seen.options.get("scale"), q.shape[-1]) * (q @ k.mT)


def top_score(seen):
    """The largest |scale q . k| of a case."""
    return float(abs(products_of(seen)).max(initial=0))


def has_scores(cases):
    """Whether weights come from scores: not in linear attention, which faint keys are made for."""
    return all(x.trial.name != "faint keys" for x in cases)


def sizes(seen):
    """{"n": ..., "m": ..., "d": ..., "e": ...}"""
    q, k, v = seen.trial.inputs
    return {"n": q.shape[-2], "m": k.shape[-2], "d": q.shape[-1], "e": v.shape[-1]}


def listed(words, last="and"):
    """a, b and c."""
    *ahead, end = map(str, words)
    return f"{', '.join(ahead)} {last} {end}" if ahead else end
