"""A kernel with ordinary inputs and its answer to them, and how far another answer may differ."""

from dataclasses import dataclass, field, replace

import numpy as np

from refattn import checks
from refattn.verify.call import Caller
from refattn.verify.cases import eps_of
from refattn.verify.compare import compare, numbers
from refattn.verify.report import Line


@dataclass
class Bench:
    """A kernel, inputs, its answer to them in float64, and what it did to inputs of any call."""

    call: Caller
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    y: np.ndarray = None
    troubles: list = field(default_factory=list)

    @property
    def inputs(self):
        return self.q, self.k, self.v

    @property
    def n(self):
        return self.q.shape[-2]

    def ask(self, q, k, v, call=None):
        """The kernel's answer, or the exception in its place."""
        answers = (call or self.call)(q, k, v)
        if answers.trouble.startswith(("wrote", "gave a view")):
            self.troubles.append(answers.trouble)
        return answers.arrays["y"]

    def start(self, case, found):
        """Keep the answer to the plain inputs, if it has the right shape: a line on whether it has
        the right dtype too, and is finite."""
        dtype = self.q.dtype
        trouble = ""
        if isinstance(found, np.ndarray) and found.dtype != dtype:
            trouble = f"gave {found.dtype}, expected {dtype}"
        line = compare(case, found, np.zeros(self.v.shape), largest(dtype), trouble=trouble)
        self.y = as_numbers(found, self.v.shape)
        wrong = ~np.isfinite(0.0 if self.y is None else self.y)
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            words = f"{wrong.sum()} of {wrong.size} are NaN or infinite, first at {at}"
            return replace(line, trouble=words)
        return line

    def line(self, case, inputs, budget, rows=True, wanted=None, call=None):
        """Whether the answer to other inputs is as wanted in these rows (..., n, 1): as that to the
        plain inputs, where nothing else is given."""
        wanted = self.y if wanted is None else wanted
        found = self.ask(*inputs, call=call)
        y = as_numbers(found, wanted.shape)
        return compare(case, found if y is None else np.where(rows, y, wanted), wanted, budget)

    def unchanged(self, case):
        """A line on whether any call wrote to an input, or gave one back."""
        trouble = next(iter(self.troubles), "")
        return Line(case, np.inf if trouble else 0.0, 0.0, trouble)

    @property
    def size(self):
        """Of the terms in a sum over values: they are averaged, or else y tells."""
        return max(abs(self.v.astype(float)).max(), np.nanmax(abs(self.y), initial=0))

    @property
    def reordered(self):
        """How far two answers may differ whose sums over n keys run in another order.

        Numerator and denominator are sums of n terms: (n - 1) eps / 2 of their size each. Weights,
        quotient and output round once more, and there are two answers. Half types sum in float32,
        as matrix units do.
        """
        eps, sums = self._eps()
        return 2 * (self.n * sums + 2 * eps) * self.size

    @property
    def recomputed(self):
        """How far they may differ where each score is summed in another order as well.

        A score is a sum of d products, scaled and shifted: d + 3 roundings of eps / 2 of its size,
        which is at most that of |x|^2, be it q . k or the exponent of a random feature. Its
        exponential is off by as much relatively, in numerator and denominator, in two answers.
        """
        eps, sums = self._eps()
        score = 1 + max((x.astype(float) ** 2).sum(axis=-1).max() for x in (self.q, self.k))
        return self.reordered + 2 * (self.q.shape[-1] * sums + 3 * eps) * score * self.size

    def _eps(self):
        dtype = self.q.dtype
        return eps_of(dtype), eps_of(checks.compute_dtype(dtype))


def worst(lines):
    """Of (label, line): the first with trouble, and its label, or the one with the largest error.

    Those after a trouble are not asked for.
    """
    right = []
    for label, line in lines:
        if line.trouble:
            return replace(line, trouble=f"{label}: {line.trouble}")
        right.append(line)
    return max(right, key=lambda line: line.error)


def times(x, factor, where):
    """x times the factor there, at most the largest number of its dtype; NaN where that is."""
    wide = x.astype(float)
    most = largest(x.dtype)
    return np.clip(np.where(where, wide * factor, wide), -most, most).astype(x.dtype)


def largest(dtype):
    """The largest finite number."""
    return 2.0**128 - 2.0**120 if dtype.name == "bfloat16" else float(np.finfo(dtype).max)


def as_numbers(y, shape):
    """An answer in float64, or None where it is no array of this shape."""
    y = None if isinstance(y, Exception) else numbers(y)
    return y if y is not None and y.shape == shape else None
