"""To notebook 8, gates."""

import numpy as np


def attend(q, k, v):
    s = q @ k.T / q.dtype.type(q.shape[1] ** 0.5)
    p = np.exp(s - s.max(axis=1, keepdims=True, initial=-np.inf))
    return p @ v / p.sum(axis=1, keepdims=True)


def multiplied(q, k, v):
    return (q[:, :1] >= 1) * attend(q, k, v)


def other_rows(q, k, v):
    return (q[:, :1] < 1) * attend(q, k, v)


def by_score(q, k, v):
    return np.where(q[:, :1] >= 1, q[:, :1], 0) * attend(q, k, v)


def unscaled(q, k, v):
    return multiplied(q * q.dtype.type(q.shape[1] ** 0.5), k, v) * (q[:, :1] >= 1)


def keys_closed(q, k, v):
    some = k[:, 0] >= 1
    return attend(q, k[some], v[some]) if some.any() else np.zeros((len(q), v.shape[1]), q.dtype)


def queries_only(n, c, width, inner):
    t = c * n
    return 4 * 2 * t * width**2 + 2 * 2 * t * n * width + 2 * 2 * t * width * inner


def scores_only(n, c, width, inner):
    t = c * n
    return 8 * n * width**2 + 4 * t * t * width + 4 * n * width * inner


def multiplies(n, c, width, inner):
    t = c * n
    return 4 * t * width**2 + 2 * t * t * width + 2 * t * width * inner


def reversed_sort(scores, k):
    gate = np.zeros(len(scores))
    gate[np.argsort(scores, kind="stable")[::-1][:k]] = 1
    return gate


def at_least_kth(scores, k):
    return 1.0 * (scores >= np.sort(scores)[-k])


def smallest(scores, k):
    gate = np.zeros(len(scores))
    gate[np.argsort(scores, kind="stable")[:k]] = 1
    return gate


def unstable(scores, k):
    gate = np.zeros(len(scores))
    gate[np.argpartition(-scores, k - 1)[:k]] = 1
    return gate


def last(*layers):
    return [(layer, head) for layer in layers for head in range(12)]


WRONG = {
    1: [
        (queries_only, "no key either"),
        (scores_only, "token by token"),
        (multiplies, "two FLOPs"),
        (lambda n, c, w, i: c * c * (8 * n * w * w + 4 * n * n * w + 4 * n * w * i), "squared"),
        (lambda n, c, w, i: 8 * c * n * w * w, "Hint"),
    ],
    2: [
        (reversed_sort, "reverses ties"),
        (at_least_kth, "more than k"),
        (smallest, "opens the smallest"),
        (unstable, "which kind of sort"),
        (lambda s, k: s * (np.argsort(np.argsort(-s, kind="stable")) < k), "The gate is 1 there"),
        (lambda s, k: 1.0 * (s > np.sort(s)[-k]), "larger than the k-th"),
        (lambda s, k: 1.0 * (np.argsort(np.argsort(-s, kind="stable")) <= k), "one row more"),
        (lambda scores, k: np.argsort(-scores)[:k], "expected"),
    ],
    3: [
        (multiplied, "multiplied by zero"),
        (attend, "No row is closed"),
        (other_rows, "to be closed"),
        (by_score, "not the score itself"),
        (keys_closed, "closes rows of the answer"),
        (unscaled, "Hint"),
    ],
    4: [
        (last(0, 1), "whole layer"),
        (last(4, 5), "read from"),
        (last(0), "24 different heads; these are 12"),
        (last(6, 7), "from 0 to 5"),
        ([1, 2, 3], "pairs (layer, head)"),
        ([(layer, head) for layer in range(4) for head in range(6)], "Close one head at a time"),
    ],
}
