"""Random features as a sample: statistics that are known for right ones, a line for each."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from refattn.verify.cases import eps_of
from refattn.verify.report import Line

CHANCE = 1e-6  # of a right draw, to exceed the budget of a line


@dataclass(frozen=True)
class Sample:
    """Rows of random features in blocks (B, d, d)."""

    blocks: np.ndarray

    @property
    def d(self):
        return self.blocks.shape[-1]

    @cached_property
    def norms(self):
        """(B, d)"""
        return np.linalg.norm(self.blocks.astype(float), axis=-1)

    @cached_property
    def directions(self):
        """(B, d, d)"""
        return unit(self.blocks)

    @cached_property
    def cosines(self):
        """(B, d (d - 1) / 2): of any two rows in a block."""
        return cosines(self.directions)

    @cached_property
    def negative(self):
        """(d, d): in which part of the blocks an entry is negative."""
        return (self.blocks < 0).mean(axis=0)

    @property
    def orthogonal_within(self):
        """What rounding explains in a cosine of orthogonal rows.

        QR by reflections keeps a block orthogonal within a small multiple of d^2 eps (Higham 2002,
        theorem 19.4). Gram and Schmidt's method loses as many digits as the block's condition
        number has: done twice it loses none.
        """
        return 8 * self.d**2 * eps_of(self.blocks.dtype)


def unit(x):
    """Rows of length 1; a row of 0 stays."""
    x = x.astype(float)
    norms = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norms == 0, 1, norms)


def cosines(directions):
    """(..., pairs) of directions (..., rows, d)."""
    gram = directions @ directions.mT
    return gram[..., *np.triu_indices(gram.shape[-1], 1)]


def statistics(sample, few, orthogonal):
    """The lines on a large sample, and on the short draws beside it."""
    first = _orthogonal(sample, few) if orthogonal else _independent(sample)
    rest = (_norms, _two_norms, _norms_and_directions, _signs, _signs_of_two_rows, _unbiased)
    return [first, *(line(sample) for line in rest)]


def held(case, error, budget, words):
    """A line, with these words where the error is above the budget."""
    return Line(case, float(error), float(budget), "" if error <= budget else words)


def normal(among=1):
    """What the largest of so many normal deviations exceeds, either way, by CHANCE at most."""
    import scipy.stats

    return scipy.stats.norm.isf(CHANCE / (2 * among))


def _orthogonal(sample, few):
    """The last block of a draw may be short, and is orthogonal too."""
    blocks = [x[i : i + sample.d] for x in few for i in range(0, len(x), sample.d)]
    found = [sample.cosines, *(cosines(unit(block)) for block in blocks)]
    largest = max(abs(x).max(initial=0) for x in found)
    words = f"the largest |cosine| of two rows in a block is {largest:.3g}, expected 0"
    return held("rows orthogonal", largest, sample.orthogonal_within, words)


def _independent(sample):
    """A squared cosine of independent directions has mean 1/d and variance
    2 (d - 1) / (d^2 (d + 2)), and no two pairs of rows correlate."""
    d, found = sample.d, (sample.cosines**2).mean()
    error = math.sqrt(2 * (d - 1) / (d**2 * (d + 2)) / sample.cosines.size)
    words = f"the mean squared cosine of two rows is {found:.3g}, expected 1/d = {1 / d:.3g}"
    return held("rows independent", abs(found - 1 / d) / error, normal(), words)


def _norms(sample):
    """Kolmogorov and Smirnov's distance, and the one that so many rows exceed by CHANCE."""
    import scipy.stats

    norms, wanted = sample.norms.ravel(), scipy.stats.chi(sample.d)
    found = scipy.stats.kstest(norms, wanted.cdf).statistic
    words = f"mean {norms.mean():.4g} and deviation {norms.std():.3g}, expected those of chi_d, "
    words += f"{wanted.mean():.4g} and {wanted.std():.3g}"
    return held("norms", found, scipy.stats.kstwo.isf(CHANCE, norms.size), words)


def _two_norms(sample):
    """The correlation of neighbours' squared norms, in standard errors."""
    squares = sample.norms**2
    one, two = squares[:, :-1].ravel(), squares[:, 1:].ravel()
    found = _correlation(one, two)
    words = f"the squared norms of two rows in a block correlate by {found:.3g}, expected 0"
    return held("norms of two rows", abs(found) * math.sqrt(one.size), normal(), words)


def _norms_and_directions(sample):
    """d^2 correlations in standard errors: the sum of their squares, times (d - 1) / d, is
    chi-squared with d (d - 1) degrees of freedom.

    The squared entries of a direction add up to 1: their correlations with a norm have the
    covariance I d / (d - 1) - J / (d - 1) over the number of blocks, J of ones, which is
    d / (d - 1) times a projection on d - 1 dimensions.
    """
    import scipy.stats

    found = _correlation(sample.norms[..., None] ** 2, sample.directions**2)  # (d, d)
    largest = found.flat[abs(found).argmax()]
    words = f"a squared norm and a squared entry of its direction correlate by {largest:.3g}"
    error = len(sample.norms) * (found**2).sum() * (sample.d - 1) / sample.d
    budget = scipy.stats.chi2.isf(CHANCE, sample.d * (sample.d - 1))
    return held("norms, directions", error, budget, words)


def _correlation(x, y):
    """Over the first axis; 0 where one is constant but for rounding."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    size = np.sqrt((x**2).mean(axis=0) * (y**2).mean(axis=0))
    return np.where(size > 1e-6, (x * y).mean(axis=0) / np.where(size > 1e-6, size, 1), 0.0)


def _signs(sample):
    """Each entry is negative in half of the blocks."""
    words = "entry {} of a block is negative in {:.1%} of them, expected half"
    return _halves("signs", np.sign(sample.blocks), words)


def _signs_of_two_rows(sample):
    """The first row's first entry against each of the other rows: to turn one row around changes
    no distribution, so that the signs differ in half of the blocks."""
    signs = np.sign(sample.blocks)
    products = signs * signs[:, :1, :1]
    products[:, 0] = np.where(np.arange(len(signs)) % 2, 1, -1)[:, None]  # not to be looked at
    words = "entries (0, 0) and {} of a block differ in sign in {:.1%} of them, expected half"
    return _halves("signs of two rows", products, words)


def _halves(case, signs, words):
    """Signs (B, d, d), each a fair coin: the largest of all deviations, in standard errors."""
    means = signs.mean(axis=0)
    at = tuple(int(i) for i in np.unravel_index(abs(means).argmax(), means.shape))
    error = abs(means[at]) * math.sqrt(len(signs))
    return held(case, error, normal(means.size), words.format(at, (1 - means[at]) / 2))


def _unbiased(sample):
    """x = e_1 and y = e_1 / 2: exp(w_1 - 1/2) exp(w_1 / 2 - 1/8) is exp(1/2) on average.

    Divided by that, its variance is exp(|x + y|^2) - 1 for independent rows, and not larger for
    orthogonal ones (Choromanski et al. 2020, theorem 2): known, where that of so skew a sample is
    hardly to be estimated.
    """
    found = np.exp(1.5 * sample.blocks[..., 0].astype(float) - 1.125)
    error = abs(found.mean() - 1) / math.sqrt(math.expm1(2.25) / found.size)
    words = f"the estimate at x = e_1, y = e_1 / 2 is {found.mean():.3f} of exp(x . y)"
    return held("unbiased", error, normal(), words)
