"""Known mistakes in drawing random features, each told by statistics of a large draw."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refattn.verify.cases import eps_of
from refattn.verify.features.sample import cosines, unit


@dataclass(frozen=True)
class Mistake:
    """A mistake, a sentence that tells it, and ``shows(sample, orthogonal)``: whether a sample has
    it, where rows should be ``orthogonal`` or not. ``met`` says where it was met."""

    name: str
    tells: str
    shows: Callable
    met: str = ""


def mistakes_of(sample, orthogonal):
    """The sentence of each mistake that the sample has."""
    return tuple(f"{m.name}: {m.tells}" for m in MISTAKES if m.shows(sample, orthogonal))


def _one_sided(sample):
    """(d,): rows with an entry that has one sign in nearly every block, and blocks differ."""
    return (abs(sample.negative - 0.5) > 0.49).any(axis=1) & (not _repeated(sample))


def _uncorrected(sample, orthogonal):
    # d = 2: the determinant of Q has one sign too, so that no row is left free
    sided = _one_sided(sample)
    return sided[0] and sample.negative[0, 0] > 0.99 and (sample.d == 2 or not sided.all())


def _fixed_signs(sample, orthogonal):
    return _one_sided(sample).all() and not _uncorrected(sample, orthogonal)


def _one_sign(sample, orthogonal):
    """Without one for all, the second entry of the second row is nearly one-sided as well."""
    agree = (sample.blocks[:, 0, 0] * sample.blocks[:, 1, 1] > 0).mean()
    return abs(sample.negative - 0.5).max() < 0.1 and abs(agree - 0.5) > 0.3


def _all_of_length(length):
    def shows(sample, orthogonal):
        wanted = length(sample.d)
        return (abs(sample.norms - wanted) <= _rounding(sample) * wanted).all()

    return shows


def _one_norm(sample, orthogonal):
    norms = sample.norms
    same = (np.ptp(norms, axis=1) <= _rounding(sample) * norms.max(axis=1)).all()
    return same and np.ptp(norms[:, 0]) > 0.1


def _rounding(sample):
    """Of a length, relatively: d entries, each rounded a few times on the way."""
    return 8 * sample.d * eps_of(sample.blocks.dtype)


def _norms_on_columns(sample, orthogonal):
    columns = abs(cosines(unit(sample.blocks.mT))).max()
    return columns <= sample.orthogonal_within < abs(sample.cosines).max()


def _not_orthogonal(sample, orthogonal):
    """The mean squared cosine of independent directions is 1/d."""
    found = (sample.cosines**2).mean() * sample.d
    return orthogonal and abs(found - 1) < 0.1 and not _norms_on_columns(sample, orthogonal)


def _orthogonal(sample, orthogonal):
    return not orthogonal and abs(sample.cosines).max() <= sample.orthogonal_within


def _repeated(sample, orthogonal=True):
    first, *others = sample.directions[:3]
    return all(abs(other - first).max() <= _rounding(sample) for other in others)


MISTAKES = [
    Mistake(
        "uncorrected QR",
        "the first entry of a block is negative in every draw, as LAPACK leaves it, so directions "
        "are not uniform and the estimate is biased for good; multiply column j of Q by the sign "
        "of R[j, j]",
        _uncorrected,
        "google-research, performer/fast_attention/jax/fast_attention.py; the default of "
        "lucidrains/performer-pytorch, whose qr_uniform_q=True mends it",
    ),
    Mistake(
        "signs fixed by an entry",
        "one entry of each row has the same sign in every draw, so directions fill half of the "
        "sphere and the estimate is biased for good; take signs from the diagonal of R, not of Q",
        _fixed_signs,
    ),
    Mistake(
        "one sign for a whole block",
        "the rows of a block turn around together; each row is right, and the estimate unbiased, "
        "but two rows depend on each other; multiply column j of Q by the sign of its own R[j, j]",
        _one_sign,
    ),
    Mistake(
        "rows of length sqrt(d)",
        "another kernel, which is used on purpose elsewhere (regularised softmax, scaling=1): less "
        "variance, and in place of exp(x . y) about 1 - |x + y|^4 / (4 (d + 2)) of it, so that "
        "weights are flatter",
        _all_of_length(np.sqrt),
        "google-research and lucidrains/performer-pytorch, as an option",
    ),
    Mistake(
        "rows of unit length",
        "norms are missing: the estimate is near exp(-(|x|^2 + |y|^2) / 2), whatever x . y is; "
        "multiply each row by a norm of its own, distributed as chi_d",
        _all_of_length(lambda d: 1.0),
    ),
    Mistake(
        "one norm for a whole block",
        "each row is right, and the estimate unbiased, but its variance is larger; draw a norm for "
        "each row",
        _one_norm,
    ),
    Mistake(
        "norms on the columns",
        "norms multiply the columns of a block, so that its rows are neither orthogonal nor chi_d "
        "long; write norms[:, None] * directions",
        _norms_on_columns,
    ),
    Mistake(
        "rows not orthogonal",
        "independent rows where orthogonal ones were asked for: unbiased, with more variance",
        _not_orthogonal,
    ),
    Mistake(
        "rows orthogonal",
        "orthogonal rows where independent ones were asked for: unbiased, with less variance",
        _orthogonal,
    ),
    Mistake(
        "one block repeated",
        "all blocks point in the same d directions, so that more features tell little more",
        _repeated,
    ),
]
