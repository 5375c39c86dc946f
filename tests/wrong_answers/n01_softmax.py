"""To notebook 1, softmax attention."""

import numpy as np


def plain(s):
    with np.errstate(all="ignore"):
        return np.log(np.sum(np.exp(s), axis=1))


def forgot_the_maximum(s):
    out = np.empty(len(s))
    for i, row in enumerate(s):
        out[i] = np.log(np.exp(row - max(row)).sum())
    return out


def one_maximum_for_all(s):
    with np.errstate(divide="ignore"):
        return s.max() + np.log(np.exp(s - s.max()).sum(axis=1))


def columns(s):
    top = s.max(axis=0)
    return top + np.log(np.exp(s - top).sum(axis=0))


def mean_of_blocks(q, k, v, block=16):
    y, count = 0, 0
    for j in range(0, len(k), block):
        s = q @ k[j : j + block].T / np.sqrt(q.shape[1], dtype=q.dtype)
        p = np.exp(s - s.max(axis=1, keepdims=True))
        y = y + p / p.sum(axis=1, keepdims=True) @ v[j : j + block]
        count += 1
    return y / q.dtype.type(count)


def online(q, k, v, block, mend, mend_a=True):
    c = np.full((len(q), 1), -np.inf, q.dtype)
    l = np.zeros((len(q), 1), q.dtype)
    a = np.zeros((len(q), v.shape[1]), q.dtype)
    for j in range(0, len(k), block):
        s = q @ k[j : j + block].T / q.dtype.type(q.shape[1] ** 0.5)
        new = np.maximum(c, s.max(axis=1, keepdims=True))
        keep, p = np.exp(c - new) if mend else 1, np.exp(s - new)
        l = keep * l + p.sum(axis=1, keepdims=True)
        a = (keep if mend_a else 1) * a + p @ v[j : j + block]
        c = new
    return a / l


def no_scale(q, k, v, block=16):
    return online(q * q.dtype.type(q.shape[1] ** 0.5), k, v, block, mend=True)


def all_at_once(q, k, v):
    return online(q, k, v, len(k), mend=True)


def never_mended(q, k, v):
    return online(q, k, v, 16, mend=False)


def only_l_mended(q, k, v):
    return online(q, k, v, 16, mend=True, mend_a=False)


def last_block_dropped(q, k, v):
    m = max(1, len(k) // 16 * 16)
    return online(q, k[:m], v[:m], 16, mend=True)


def in_float64(q, k, v):
    return online(q.astype(np.float64), k, v, 16, mend=True)


def mean(y_a, lse_a, y_b, lse_b):
    return 0.5 * (y_a + y_b), np.logaddexp(lse_a, lse_b)


def by_logs(y_a, lse_a, y_b, lse_b):
    with np.errstate(all="ignore"):
        total = lse_a + lse_b
        y = (lse_a / total)[:, None] * y_a + (1 - lse_a / total)[:, None] * y_b
    return y, np.logaddexp(lse_a, lse_b)


def logs_added(y_a, lse_a, y_b, lse_b):
    lse = np.logaddexp(lse_a, lse_b)
    return np.exp(lse_a - lse)[:, None] * y_a + np.exp(lse_b - lse)[:, None] * y_b, lse_a + lse_b


def shared(y_a, lse_a, y_b, lse_b):
    lse = np.logaddexp(lse_a, lse_b)
    return np.exp(lse_a - lse)[:, None] * y_a + np.exp(lse_b - lse)[:, None] * y_b, lse


def overflowing(y_a, lse_a, y_b, lse_b):
    with np.errstate(all="ignore"):
        a, b = np.exp(lse_a)[:, None], np.exp(lse_b)[:, None]
        return (a * y_a + b * y_b) / (a + b), np.log((a + b)[:, 0])


WRONG = {
    1: [
        (plain, "overflows"),
        (forgot_the_maximum, "not put back"),
        (columns, "over the queries"),
        (lambda s: s.max(axis=1), "only a lower bound"),
        (one_maximum_for_all, "Take the row's maximum"),
        (lambda s: forgot_the_maximum(s) - s.max(axis=1), "with a plus"),
        (lambda s: s.max(axis=1, keepdims=True), "expected (4,)"),
    ],
    2: [
        (mean_of_blocks, "averages the blocks"),
        (never_mended, "exp(c - c')"),
        (no_scale, "scale missing"),
        (only_l_mended, "after the first 16 keys"),
        (last_block_dropped, "the last block too"),
        (in_float64, "in q's dtype"),
        (all_at_once, "all scores are there at once"),
    ],
    3: [
        ((128, 64), "room for 16,384"),
        ((40, 66), "Queries in the tile"),
        ((1, 16), "There is room left"),
        ((0, 4), "two whole numbers"),
        (64, "two whole numbers"),
        ((126, 1), "room for 16,384"),
        ((1, -3), "two whole numbers"),
        (np.array([1, 100]), "There is room left"),
    ],
    4: [
        (mean, "do not weigh the same"),
        (by_logs, "lse is a log"),
        (logs_added, "not the sum of two logs"),
        (overflowing, "NaN"),
        (lambda y_a, lse_a, y_b, lse_b: shared(y_b, lse_a, y_a, lse_b), "the other's share"),
        (lambda y_a, lse_a, y_b, lse_b: y_a + y_b, "expected (y, lse)"),
    ],
}
