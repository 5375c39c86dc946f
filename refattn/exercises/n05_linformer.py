"""Exercises of notebook 5, Linformer."""

import functools

import numpy as np

import refattn
from refattn import course
from refattn.exercises.base import Design, Function, Kernel, Refused
from refattn.exercises.heads import exact_heads
from refattn.linformer import linformer_attention, linformer_attention_cost, projections

ROWS, TOKENS = 32, 512  # of E in exercise 2
BUDGET = 16  # rows of E in exercise 5


@functools.cache
def _first_cheaper(r, d):
    """The least N at which linformer's counted FLOPs are fewer than softmax attention's."""
    n = 1
    while linformer_flops(n, r, d) >= refattn.softmax_attention_cost(n, n, d, d).flops:
        n += 1
    return n


def linformer_flops(n, r, d):
    """Counted FLOPs for n tokens of d columns."""
    return linformer_attention_cost(n, n, d, d, r=r).flops


def _equal_counts(r, d):
    """The least N at which the counts are equal or linformer's is lower."""
    return -(-r * (8 * d + 6) // (4 * d + 6))


@functools.cache
def _projection():
    return projections.mean_pool(ROWS, TOKENS)


def _softmax(scores):
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def _projected_weights(q, k, v):
    """The softmax over all keys, its weights projected after it."""
    E = _projection()
    return _softmax(q @ k.T / q.shape[1] ** 0.5) @ E.T @ (E @ v)


def _scaled_by_rows(q, k, v):
    """Scores divided by sqrt(r) instead of sqrt(d)."""
    E = _projection()
    return _softmax(q @ (E @ k).T / len(E) ** 0.5) @ (E @ v)


def _summed_values(q, k, v):
    """Values of a segment added up, not averaged."""
    E = _projection()
    return _softmax(q @ (E @ k).T / q.shape[1] ** 0.5) @ (E @ v) * (TOKENS // ROWS)


def _pool(r, m, length):
    E = np.zeros((r, m))
    E[:, :length] = projections.mean_pool(r, length)
    return E


def _pool_hidden(r, m, length):
    """Segments of all m places, the padding's weights then set to zero."""
    E = projections.mean_pool(r, m)
    E[:, length:] = 0
    return E


def _pool_all(r, m, length):
    return projections.mean_pool(r, m)


def _pool_sums(r, m, length):
    return (_pool(r, m, length) > 0).astype(float)


def _pool_renormalised(r, m, length):
    """Segments of all m places less the padding; rows that are not empty sum to 1."""
    E = _pool_hidden(r, m, length)
    total = E.sum(axis=1, keepdims=True)
    return E / np.where(total > 0, total, 1)


def _pool_by_token(r, m, length):
    """Token j in segment j r // length: segments of the right number, cut elsewhere."""
    E = np.zeros((r, m))
    E[np.arange(length) * r // length, np.arange(length)] = 1
    return E / E.sum(axis=1, keepdims=True)


def _pool_split(r, m, length):
    """Cut as np.array_split cuts, the longer segments first."""
    E = np.zeros((r, m))
    for row, part in zip(E, np.array_split(np.arange(length), r), strict=True):
        row[part] = 1 / len(part)
    return E


def _last(E):
    """The last key in each mixture, (r,)."""
    m = E.shape[1]
    return m - 1 - (E != 0)[:, ::-1].argmax(axis=1)


def _legal(E):
    return _last(E) <= np.arange(E.shape[1])[:, None]  # (m, r)


def _legal_strictly(E):
    return _last(E) < np.arange(E.shape[1])[:, None]


def _legal_from_first(E):
    return (E != 0).argmax(axis=1) <= np.arange(E.shape[1])[:, None]


def _legal_positive(E):
    return _legal(np.where(E > 0, E, 0))


def _legal_by_sum(E):
    """Judged by whether the weights after the query sum to zero."""
    later = E.sum(axis=1)[:, None] - E.cumsum(axis=1)  # (r, m)
    return (abs(later) < 1e-12).T


def _projections():
    gaps = np.zeros((3, 9))
    gaps[0, [0, 4]], gaps[1, [1, 2]], gaps[2, 8] = 0.5, (1.5, -1.5), 1.0
    return [(projections.mean_pool(4, 12),), (projections.gaussian(3, 8, rng=0),), (gaps,)]


def mean_error(E):
    """Mean relative error over the heads of one E for all of them, for keys and values."""
    _, q, k, v, exact = exact_heads()
    with np.errstate(all="ignore"):
        return float(course.relative_error(linformer_attention(q, k, v, E=E), exact).mean())


def _error_of_design(E):
    shape = np.shape(E)
    if len(shape) != 2 or shape[1] != TOKENS or not shape[0]:
        raise Refused(f"Give an array (r, {TOKENS}): r mixtures of {TOKENS} tokens; got {shape}.")
    if shape[0] > BUDGET:
        raise Refused(f"Over budget: {shape[0]} rows, {BUDGET} are allowed.")
    E = np.asarray(E)
    if E.dtype.kind not in "fiu" or not np.isfinite(E).all():
        raise Refused("The entries of E must be finite real numbers.")
    return mean_error(E.astype(np.float64))


def _fits(E):
    """Whether it has the form of a design; the notes speak of no other."""
    return np.ndim(E) == 2 and np.shape(E)[1] == TOKENS and np.isfinite(E).all()


def _rows_left(E):
    return _fits(E) and len(E) < BUDGET


def _has_single(E):
    return _fits(E) and np.any((np.asarray(E) != 0).sum(axis=1) == 1)


def _far_from_one(E):
    return _fits(E) and np.any(abs(np.sum(E, axis=1) - 1) > 1)


EXERCISES = {
    1: Function(
        "break_even",
        points=2,
        truth=_first_cheaper,
        cases=[(128, 64), (256, 64), (16, 32), (5, 1), (1, 1)],
        hint="Set equation (5) below the FLOPs of softmax attention, divide by N, solve for N.",
        mistakes={
            "That is where N passes r: it leaves out what E K and F V cost, which is as much again "
            "as the scores and the sum.": lambda r, d: r + 1,
            "2 r is what is left when the softmax's own 6 FLOPs a pair are forgotten: they are in "
            "both counts, and move the point.": lambda r, d: 2 * r,
            "At an N where the two counts are equal Linformer is not yet the cheaper "
            "one.": _equal_counts,
        },
    ),
    2: Kernel(
        "linformer",
        points=2,
        mechanism="linformer_attention",
        options=lambda: dict(E=_projection()),
        hint="Project keys and values first; what is left is softmax attention on r keys.",
        mistakes={
            "You projected the weights after a softmax over all keys: P Eᵀ (E V). Linformer "
            "projects the keys, ahead of the softmax.": _projected_weights,
            "The scores are divided by the square root of r. The inner products are still over d "
            "columns: divide by the square root of d.": _scaled_by_rows,
            "The values of a segment are added up: F V has the rows of E, means and not "
            "sums.": _summed_values,
        },
        flops=lambda n, d: 1.05 * linformer_flops(n, ROWS, d),
        memory=lambda n, d: 4 * n * n * 0.95,  # room for float64 inside, none for N x N
        at=(TOKENS, 32),
        advice="Right, but it still makes N x N scores: Q (E K)ᵀ and (Q Kᵀ) Eᵀ are equal, and only "
        "one of them is cheap.",
    ),
    3: Function(
        "pool",
        points=2,
        truth=_pool,
        cases=[(4, 8, 8), (4, 12, 8), (3, 10, 7), (32, 512, 300)],
        tolerance=1e-6,
        hint="What would E be if the text ended at `length`? Then add columns of zeros.",
        mistakes={
            "Setting the padding's columns to zero is not enough: rows no longer sum to 1, and "
            "rows of padding alone become a key of zeros that still takes weight.": _pool_hidden,
            "Padding is averaged into the last mixtures: E must not depend on what stands after "
            "`length`.": _pool_all,
            "Rows must sum to 1: a sum of keys has scores many times as large as those of their "
            "mean.": _pool_sums,
            "Rows of padding alone are empty now: a key of zeros still takes weight. Cut the text "
            "into r segments, not the m places.": _pool_renormalised,
            "The segments are right in number but not cut as mean_pool cuts: segment t begins at "
            "token t * length // r.": _pool_by_token,
            "np.array_split makes the first segments the longer ones; mean_pool begins segment t "
            "at token t * length // r.": _pool_split,
        },
    ),
    4: Function(
        "legal",
        points=2,
        truth=_legal,
        cases=_projections,
        hint="For each row of E: which key is the last with a weight that is not zero?",
        mistakes={
            "A mixture is known once its first key is, you say; but its later keys are in it "
            "too. What counts is the last.": _legal_from_first,
            "A query may read its own key: the last key of the mixture may be the query's "
            "own.": _legal_strictly,
            "A negative weight lets a key in as much as a positive one.": _legal_positive,
            "Weights that cancel in a sum still let their keys in: look at each "
            "weight.": _legal_by_sum,
        },
    ),
    5: Design(
        "one E for all heads",
        points=2,
        hint="Start from mean pooling and go down the gradient: dE of all heads, added up.",
        score=_error_of_design,
        plain=lambda: mean_error(projections.mean_pool(BUDGET, TOKENS)),
        best=0.396,
        enough=0.85,
        unit="mean error",
        notes={
            "There are rows left: the budget is 16.": _rows_left,
            "A mixture of one key gets as much weight in the softmax as a mixture of many: giving "
            "a token a row of its own makes it count for more than it is.": _has_single,
            "Rows far from sum 1 make keys of another size than those that the head was trained "
            "on: the softmax gets too sharp, or the values too large.": _far_from_one,
        },
    ),
}
