"""To notebook 7, the block hierarchy."""

import numpy as np

import refattn

KINDS = refattn.datasets.load_heads().kind


def mean(y1, lse1, y2, lse2):
    return (y1 + y2) / 2, np.logaddexp(lse1, lse2)


def weighted_mean(y1, lse1, y2, lse2):
    """Overflows on large scores."""
    with np.errstate(all="ignore"):
        w1, w2 = np.exp(lse1)[:, None], np.exp(lse2)[:, None]
        return (w1 * y1 + w2 * y2) / (w1 + w2), np.log(w1 + w2)[:, 0]


def infinite_lse(y1, lse1, y2, lse2):
    """As the hint is written: lse is infinite on large scores."""
    with np.errstate(all="ignore"):
        lse = np.log(np.exp(lse1) + np.exp(lse2))
        return np.exp(lse1 - lse)[:, None] * y1 + np.exp(lse2 - lse)[:, None] * y2, lse


def summed_logs(y1, lse1, y2, lse2):
    lse = np.logaddexp(lse1, lse2)
    y = np.exp(lse1 - lse)[:, None] * y1 + np.exp(lse2 - lse)[:, None] * y2
    return y, lse1 + lse2


def maximum_lse(y1, lse1, y2, lse2):
    lse = np.logaddexp(lse1, lse2)
    y = np.exp(lse1 - lse)[:, None] * y1 + np.exp(lse2 - lse)[:, None] * y2
    return y, np.maximum(lse1, lse2)


def crossed(y1, lse1, y2, lse2):
    lse = np.logaddexp(lse1, lse2)
    y = np.exp(lse2 - lse)[:, None] * y1 + np.exp(lse1 - lse)[:, None] * y2
    return y, lse


def not_normalised(y1, lse1, y2, lse2):
    with np.errstate(all="ignore"):
        y = np.exp(lse1)[:, None] * y1 + np.exp(lse2)[:, None] * y2
    return y, np.logaddexp(lse1, lse2)


def only_y(y1, lse1, y2, lse2):
    return crossed(y2, lse1, y1, lse2)[0]


def parts(q, k, v, block=64, whole=False):
    """Each block's attention and log-sum-exp, by hand."""
    for start in range(0, len(k) - (block - 1 if whole else 0), block):
        s = q @ k[start : start + block].T / q.dtype.type(q.shape[1] ** 0.5)
        top = s.max(axis=1, keepdims=True)
        p = np.exp(s - top)
        total = p.sum(axis=1, keepdims=True)
        yield p @ v[start : start + block] / total, top + np.log(total)


def mean_of_blocks(q, k, v):
    ys = [y for y, _ in parts(q, k, v)]
    return sum(ys) / q.dtype.type(len(ys))


def sum_of_blocks(q, k, v):
    return sum(y for y, _ in parts(q, k, v))


def short_block_lost(q, k, v):
    y, lse = np.zeros((len(q), v.shape[1]), q.dtype), np.full((len(q), 1), -np.inf, q.dtype)
    for a, lse_a in parts(q, k, v, whole=True):
        both = np.logaddexp(lse, lse_a)
        y, lse = np.exp(lse - both) * y + np.exp(lse_a - both) * a, both
    return y


def not_rescaled(q, k, v):
    y, total = np.zeros((len(q), v.shape[1]), q.dtype), np.zeros((len(q), 1), q.dtype)
    for start in range(0, len(k), 64):
        s = q @ k[start : start + 64].T / q.dtype.type(q.shape[1] ** 0.5)
        p = np.exp(s - s.max(axis=1, keepdims=True))
        y += p @ v[start : start + 64]
        total += p.sum(axis=1, keepdims=True)
    return y / total


def all_at_once(q, k, v):
    s = q @ k.T / q.dtype.type(q.shape[1] ** 0.5)
    p = np.exp(s - s.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True) @ v


def two_passes(q, k, v):
    """First the log-sum-exp, then everything again."""
    lse = np.full((len(q), 1), -np.inf, q.dtype)
    for _, lse_a in parts(q, k, v):
        lse = np.logaddexp(lse, lse_a)
    return sum(np.exp(lse_a - lse) * a for a, lse_a in parts(q, k, v))


WRONG = {
    1: [
        (mean, "the plain mean"),
        (weighted_mean, "exp(1000) overflows"),
        (infinite_lse, "exp(1000) is infinite"),
        (summed_logs, "do not add"),
        (maximum_lse, "the larger of the two"),
        (crossed, "on the wrong parts"),
        (not_normalised, "add up to one"),
        (only_y, "expected (y, lse), got ndarray"),
    ],
    2: [
        (mean_of_blocks, "a mean of parts"),
        (sum_of_blocks, "about M times too large"),
        (short_block_lost, "last block is missing"),
        (not_rescaled, "different offsets"),
        (all_at_once, "no array of n x n"),
        (two_passes, "each block of keys once"),
    ],
    3: [
        (lambda n, r: (n**0.5, n**0.5 + r * n**0.5 - r), "best block for one summary"),
        (lambda n, r: (r * n**0.5, r * n**0.5 + r * (n**0.5 / r - 1)), "below the root"),
        (lambda n, r: ((r * n) ** 0.5, 2 * (r * n) ** 0.5), "summaries of its own block"),
        (lambda n, r: ((r * n) ** 0.5, (r * n) ** 0.5 + (n / r) ** 0.5 - 1), "r summaries of each"),
        (lambda n, r: ((r * n) ** 0.5, n * (2 * (r * n) ** 0.5 - r)), "one query meets"),
        (lambda n, r: ((n / r) ** 0.5, 2 * (n * r) ** 0.5 - r), "derivative to zero"),
        (lambda n, r: (r * n) ** 0.5, "expected (b, keys), got float"),
    ],
    4: [
        (dict.fromkeys(KINDS, 96), "Over budget"),
        (dict.fromkeys(KINDS, 40), "must be one of"),
        ({"local": 64}, "a block size for each of"),
        (dict.fromkeys(KINDS, 64), "One size for all"),
        (dict.fromkeys(KINDS, 64) | {"diffuse": 16}, "both cheaper and better"),
    ],
}
