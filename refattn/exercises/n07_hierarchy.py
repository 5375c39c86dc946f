"""Exercises of notebook 7, the block hierarchy."""

import functools

import numpy as np

import refattn
from refattn import course
from refattn.exercises.base import Design, Function, Kernel, Refused
from refattn.exercises.heads import exact_heads

HEADS = 12
BLOCK = 64  # of exercise 2
BLOCKS = (16, 23, 32, 48, 64, 96, 128, 192, 256, 512)  # that exercise 4 offers
PLAIN = 64


# 1: two parts merged


def _merge(y1, lse1, y2, lse2):
    return refattn.merge_attention((y1, y2), (lse1, lse2))


def _parts():
    """Two parts of ordinary size, of huge scores, and one part that saw nothing."""
    rng = np.random.default_rng(7)
    cases = []
    for size in (1.0, 1000.0):
        y1, y2 = rng.standard_normal((2, 5, 3))
        lse1, lse2 = size * rng.standard_normal((2, 5))
        cases.append((y1, lse1, y2, lse2))
    y1, lse1, y2, lse2 = cases[0]
    nothing = np.full(5, -np.inf)
    return [*cases, (y1, lse1, np.zeros_like(y2), nothing)]


def _weighted(y1, w1, y2, w2):
    return w1[:, None] * y1 + w2[:, None] * y2


def _mean(y1, lse1, y2, lse2):
    return (y1 + y2) / 2, np.logaddexp(lse1, lse2)


def _swapped(y1, lse1, y2, lse2):
    return _merge(y2, lse1, y1, lse2)


def _added(y1, lse1, y2, lse2):
    return _merge(y1, lse1, y2, lse2)[0], lse1 + lse2


def _largest(y1, lse1, y2, lse2):
    return _merge(y1, lse1, y2, lse2)[0], np.maximum(lse1, lse2)


def _undivided(y1, lse1, y2, lse2):
    return _weighted(y1, np.exp(lse1), y2, np.exp(lse2)), np.logaddexp(lse1, lse2)


def _overflowing(y1, lse1, y2, lse2):
    w1, w2 = np.exp(lse1), np.exp(lse2)
    y = _weighted(y1, w1 / (w1 + w2), y2, w2 / (w1 + w2))
    return y, np.log(w1 + w2)


def _infinite(y1, lse1, y2, lse2):
    lse = np.log(np.exp(lse1) + np.exp(lse2))
    return _weighted(y1, np.exp(lse1 - lse), y2, np.exp(lse2 - lse)), lse


# 2: the exact fusion, one block of keys after the other


def _pieces(q, k, v, last=True):
    """(A_I, lse_I) of each block of keys."""
    for start in range(0, len(k), BLOCK):
        keys = slice(start, start + BLOCK)
        if last or start + BLOCK <= len(k):
            yield refattn.softmax_attention(q, k[keys], v[keys], return_lse=True)


def _mean_of_blocks(q, k, v):
    return np.mean([y for y, _ in _pieces(q, k, v)], axis=0)


def _sum_of_blocks(q, k, v):
    return np.sum([y for y, _ in _pieces(q, k, v)], axis=0)


def _without_the_rest(q, k, v):
    whole = list(_pieces(q, k, v, last=False))
    if not whole:
        return np.zeros((len(q), v.shape[1]))
    return refattn.merge_attention(*zip(*whole, strict=True))[0]


def _no_rescaling(q, k, v):
    s = q @ k.T / q.shape[1] ** 0.5
    y, total = np.zeros((len(q), v.shape[1])), np.zeros((len(q), 1))
    for start in range(0, len(k), BLOCK):
        part = s[:, start : start + BLOCK]
        p = np.exp(part - part.max(axis=1, keepdims=True))
        y, total = y + p @ v[start : start + BLOCK], total + p.sum(axis=1, keepdims=True)
    return y / total


# 3: the best block


def _best(n, r):
    return (r * n) ** 0.5, 2 * (r * n) ** 0.5 - r


def _at(b, n, r):
    return b, b + r * (n / b - 1)


def _blind_to_r(n, r):
    return _at(n**0.5, n, r)


def _r_outside(n, r):
    return _at(r * n**0.5, n, r)


def _own_block_twice(n, r):
    return (r * n) ** 0.5, 2 * (r * n) ** 0.5


def _one_summary(n, r):
    b = _best(n, r)[0]
    return b, b + n / b - 1


def _all_queries(n, r):
    b, keys = _best(n, r)
    return b, n * keys


# 4: a block for each head


@functools.cache
def errors(block):
    """Relative error of two-level attention on each head."""
    _, q, k, v, exact = exact_heads()
    return course.relative_error(refattn.two_level_attention(q, k, v, block=block), exact)


def flops_of(blocks):
    """FLOPs of one block size a head on 512 tokens."""
    return sum(refattn.two_level_attention_cost(512, 512, 32, 32, block=b).flops for b in blocks)


def mean_error(blocks):
    """Mean relative error over the heads."""
    return float(np.mean([errors(b)[head] for head, b in enumerate(blocks)]))


def _blocks(choice):
    kinds = exact_heads().heads.kind
    if not isinstance(choice, dict) or set(choice) != set(kinds):
        raise Refused(f"Give a dict with a block size for each of: {', '.join(kinds)}.")
    blocks = [choice[kind] for kind in kinds]
    if not all(isinstance(b, (int, np.integer)) and b in BLOCKS for b in blocks):
        raise Refused(f"Each block must be one of {', '.join(map(str, BLOCKS))}.")
    return blocks


def _error_of_choice(choice):
    blocks = _blocks(choice)
    spent = flops_of(blocks) / flops_of([PLAIN] * HEADS)
    if spent > 1:
        raise Refused(f"Over budget: these blocks cost {spent:.2f} of what is allowed.")
    return mean_error(blocks)


def _wasteful(choice):
    """Whether a head has a block with a smaller error that costs no more."""
    for head, b in enumerate(_blocks(choice)):
        cheap = [x for x in BLOCKS if flops_of([x]) <= flops_of([b])]
        if min(errors(x)[head] for x in cheap) < errors(b)[head]:
            return True
    return False


EXERCISES = {
    1: Function(
        "merge",
        points=2,
        truth=_merge,
        cases=_parts,
        tolerance=1e-9,
        parts=("y", "lse"),
        hint="The new lse first: lse = log(exp(lse1) + exp(lse2)). Then each part's weight.",
        mistakes={
            "This is the plain mean: a part that saw large scores must weigh more.": _mean,
            "The weights are on the wrong parts: y1 belongs to lse1.": _swapped,
            "The log-sum-exps do not add. What adds are the sums of exponentials below the log"
            "arithms.": _added,
            "lse is the larger of the two: near it, but the smaller part has its share.": _largest,
            "The weights must add up to one: divide by the sum over both parts.": _undivided,
            "Right on small scores, but exp(1000) overflows. Only differences of log-sum-exps may "
            "go into exp: subtract the larger one first.": _overflowing,
            "Right on small scores, but exp(1000) is infinite, and so is the lse from it. Take the "
            "larger one out of the logarithm: it comes back as a sum.": _infinite,
        },
    ),
    2: Kernel(
        "exact fusion",
        points=3,
        mechanism="block_attention",
        options=dict(block=BLOCK, fuse="exact"),
        hint="Keep y and lse of the blocks so far, and merge the next block into them: exercise 1.",
        mistakes={
            "Each block has the same weight here: a mean of parts. Weigh part I with "
            "exp(lse_I - lse), query by query.": _mean_of_blocks,
            "The parts are added without weights, the chapter's sum as it stands: what comes out "
            "is about M times too large.": _sum_of_blocks,
            "The last block is missing where it is shorter than the others.": _without_the_rest,
            "Each block subtracts its own maximum, and the sums of the blocks before are not "
            "brought to the new one: exponentials of different offsets were added.": _no_rescaling,
        },
        flops=lambda n, d: (
            1.2 * refattn.block_attention_cost(n, n, d, d, block=BLOCK, fuse="exact").flops
        ),
        memory=lambda n, d: 4 * n * n / 2,
        advice="Right, but too dear: look at each block of keys once, with no array of n x n.",
    ),
    3: Function(
        "the best block",
        points=2,
        truth=_best,
        cases=[(1024, 1), (4096, 4), (1_000_000, 2), (32_768, 8)],
        tolerance=lambda w: 1e-9 * abs(w),
        parts=("b", "keys"),
        hint="Write the keys a query meets as a function of b, and set its derivative to zero.",
        mistakes={
            "That is the best block for one summary: with r of them far blocks are dearer, and "
            "there should be fewer.": _blind_to_r,
            "The derivative is 1 - r N / b^2: r stands below the root.": _r_outside,
            "A query does not meet the summaries of its own block.": _own_block_twice,
            "b is right. But a query meets r summaries of each other block, not one.": _one_summary,
            "b is right. Asked are the keys that one query meets, not all n.": _all_queries,
        },
    ),
    4: Design(
        "a block for each head",
        points=3,
        hint="What does each head gain from a wider block? Which lose nothing with a cheaper one?",
        score=_error_of_choice,
        plain=lambda: mean_error([PLAIN] * HEADS),
        best=lambda: mean_error(BEST),
        unit="mean error",
        notes={
            "One size for all: heads with sharp and with flat scores need different blocks.": (
                lambda choice: len(set(choice.values())) == 1
            ),
            "One of the heads has a block that is both cheaper and better, so that others could "
            "have more.": _wasteful,
        },
    ),
}

# Of all choices within the budget the one with the least mean error (solutions/07_hierarchy).
BEST = [32, 48, 16, 23, 48, 23, 23, 23, 192, 128, 48, 96]
