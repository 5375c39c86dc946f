"""Exercises of notebook 1, softmax attention."""

import numpy as np

import refattn
from refattn.exercises.base import Design, Function, Kernel, Refused

# Of exercise 3: numbers that fast memory holds; tokens; columns of q, k and v.
FAST, N, D = 16_384, 4096, 64


def _scores():
    rng = np.random.default_rng(0)
    shifts = [np.zeros((4, 1)), np.array([[50.0], [-50.0]]), np.array([[1e4], [-1e4]])]
    return [(rng.standard_normal((len(shift), 6)) + shift,) for shift in shifts]


def _log_sum_exp(s):
    q, k = s, np.eye(s.shape[1])
    return refattn.softmax_attention(q, k, k, scale=1.0, return_lse=True)[1]


def _overflowing(s):
    return np.log(np.exp(s).sum(axis=-1))


def _maximum_lost(s):
    return np.log(np.exp(s - s.max(axis=-1, keepdims=True)).sum(axis=-1))


def _maximum(s):
    return s.max(axis=-1)


def _maximum_twice_out(s):
    return np.log(np.exp(s - s.max(axis=-1, keepdims=True)).sum(axis=-1)) - s.max(axis=-1)


def _over_queries(s):
    return np.log(np.exp(s - s.max(axis=0)).sum(axis=0)) + s.max(axis=0)


def _block_means(q, k, v, block=16):
    """Each block's own softmax, the blocks averaged."""
    parts = range(0, len(k), block)
    return np.mean(
        [refattn.softmax_attention(q, k[j : j + block], v[j : j + block]) for j in parts], axis=0
    )


def _not_mended(q, k, v, block=16):
    """The sums go on with a new maximum, what was summed before stays as it was."""
    s = q @ k.T / q.shape[1] ** 0.5
    top, total, out = -np.inf, 0.0, 0.0
    for j in range(0, len(k), block):
        part = s[:, j : j + block]
        top = np.maximum(top, part.max(axis=1, keepdims=True))
        p = np.exp(part - top)
        total, out = total + p.sum(axis=1, keepdims=True), out + p @ v[j : j + block]
    return out / total


def held(block_q, block_k):
    """Numbers in fast memory: q and y, k and v, the scores, l and the maximum."""
    return block_q * (2 * D + 2) + block_k * 2 * D + block_q * block_k


def moved(block_k):
    """Loads and stores of FlashAttention's algorithm 1: equation (6) of the notebook."""
    passes = -(-N // block_k)
    return N * 2 * D + passes * N * (2 * D + 2) + passes * N * (D + 2)


def _two_sizes(sizes):
    good = isinstance(sizes, (tuple, list, np.ndarray)) and len(sizes) == 2
    return good and all(isinstance(b, (int, np.integer)) and b >= 1 for b in sizes)


def _traffic(sizes):
    if not _two_sizes(sizes):
        raise Refused("Give (block_q, block_k), two whole numbers of at least 1.")
    if held(*sizes) > FAST:
        raise Refused(
            f"These tiles hold {held(*sizes):,} numbers, but there is room for {FAST:,}: q and y, "
            "k and v, the scores, and two numbers for each query's sum and maximum."
        )
    return moved(sizes[1])


def _least():
    return min(moved(b) for b in range(1, N + 1) if held(1, b) <= FAST)


def _halves():
    heads = refattn.datasets.load_heads()
    cases = []
    for kind, cut in (("peaked", 200), ("diffuse", 511)):
        q, k, v = (x.astype(np.float64) for x in heads.pick(kind))
        a = refattn.softmax_attention(q, k[:cut], v[:cut], return_lse=True)
        b = refattn.softmax_attention(q, k[cut:], v[cut:], return_lse=True)
        cases.append((*a, *b))
    y, lse, y2, lse2 = cases[0]
    return [*cases, (y, lse + 2000, y2, lse2 + 2000), (y, lse, 0 * y2, np.full_like(lse2, -np.inf))]


def _fuse(y_a, lse_a, y_b, lse_b):
    return refattn.merge_attention([y_a, y_b], [lse_a, lse_b])


def _mean_of_halves(y_a, lse_a, y_b, lse_b):
    return (y_a + y_b) / 2, np.logaddexp(lse_a, lse_b)


def _shares_swapped(y_a, lse_a, y_b, lse_b):
    return _fuse(y_b, lse_a, y_a, lse_b)


def _weighted_by_lse(y_a, lse_a, y_b, lse_b):
    a = (lse_a / (lse_a + lse_b))[:, None]
    return a * y_a + (1 - a) * y_b, np.logaddexp(lse_a, lse_b)


def _lse_added(y_a, lse_a, y_b, lse_b):
    return _fuse(y_a, lse_a, y_b, lse_b)[0], lse_a + lse_b


EXERCISES = {
    1: Function(
        "log_sum_exp",
        points=2,
        truth=_log_sum_exp,
        cases=_scores,
        tolerance=1e-11,
        hint="Take the row's maximum out of the sum; equation (3) says that you may.",
        mistakes={
            "exp of a large score overflows, and of a very negative one is 0: take the row's "
            "maximum out of the sum first.": _overflowing,
            "The maximum was taken out of the sum, but not put back after the log.": _maximum_lost,
            "The maximum comes back with a plus: log(e^c times a sum) is c plus the log of the "
            "sum.": _maximum_twice_out,
            "The maximum alone is only a lower bound: the other keys add to the sum.": _maximum,
            "The sum goes over the queries: a row of s is one query, its keys are the last "
            "axis.": _over_queries,
        },
    ),
    2: Kernel(
        "one_pass",
        points=3,
        mechanism="softmax_attention",
        hint="Keep c, l and a as in equation (4), in q's dtype; let s hold the scores of "
        "k[j : j + block], the last block too, which may be shorter.",
        mistakes={
            "It averages the blocks. Each block must weigh as much as its sum of exponentials: "
            "keep l and divide once, at the end.": _block_means,
            "When the maximum rises, what was summed before must be scaled down with it: "
            "both l and a get the factor exp(c - c').": _not_mended,
        },
        memory=lambda n, d: n * n,  # a quarter of the scores in float32
        advice="Right, but all scores are there at once: let no array hold more than n x block.",
    ),
    3: Design(
        "tile sizes",
        points=2,
        hint="Which of the two sizes does equation (6) depend on?",
        score=_traffic,
        plain=lambda: moved(16),
        best=_least,
        unit="numbers moved",
        notes={
            "There is room left: a larger block of keys means fewer passes.": lambda x: (
                _two_sizes(x) and held(x[0], x[1] + 1) <= FAST
            ),
            "Queries in the tile take room that keys could use: traffic depends on keys alone "
            "(other costs do not, see the solution).": lambda x: held(*x) <= FAST and x[0] > 1,
        },
        enough=1.0,
    ),
    4: Function(
        "fuse",
        points=3,
        truth=_fuse,
        cases=_halves,
        tolerance=1e-12,
        parts=("y", "lse"),
        hint="exp(lse_a - lse) is the share of the whole that the first half holds, and lse adds "
        "two sums of exponentials under a log.",
        mistakes={
            "The halves do not weigh the same: each weighs as its sum of exponentials, "
            "exp(lse).": _mean_of_halves,
            "Each half has the other's share: exp(lse_a - lse) belongs to y_a.": _shares_swapped,
            "The weights are not the lse but their exponentials: lse is a log.": _weighted_by_lse,
            "y is right. lse is the log of a sum, not the sum of two logs.": _lse_added,
        },
    ),
}
