"""To notebook 2, local attention."""

import numpy as np

import refattn

KINDS = refattn.datasets.load_heads().kind


def attend(first, last, mean=False):
    """A causal window of keys i + first .. i + last, row by row."""

    def kernel(q, k, v):
        y = np.zeros((len(q), v.shape[1]), q.dtype)
        for i in range(len(q)):
            near = slice(max(0, i + first), max(0, i + last + 1))
            s = k[near] @ q[i] / q.dtype.type(q.shape[1] ** 0.5)
            p = np.exp(s - s.max(initial=-np.inf))
            y[i] = p / p.sum() @ v[near] if len(p) else 0
        return y

    return kernel


def full_matrix(q, k, v):
    i = np.arange(len(q))
    s = q @ k.T / q.dtype.type(q.shape[1] ** 0.5)
    s[(i > i[:, None]) | (i < i[:, None] - 5)] = -np.inf
    p = np.exp(s - s.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True) @ v


def from_below_zero(q, k, v):
    y = np.zeros((len(q), v.shape[1]), q.dtype)
    for i in range(len(q)):
        near = slice(i - 5, i + 1)
        s = k[near] @ q[i] / q.dtype.type(q.shape[1] ** 0.5)
        p = np.exp(s - s.max())
        y[i] = p / p.sum() @ v[near]
    return y


def first_key_again(q, k, v):
    near = np.maximum(np.arange(len(q))[:, None] + np.arange(-5, 1), 0)  # (n, 6)
    s = np.einsum("nd,ntd->nt", q, k[near]) / q.dtype.type(q.shape[1] ** 0.5)
    p = np.exp(s - s.max(axis=1, keepdims=True))
    return np.einsum("nt,nte->ne", p / p.sum(axis=1, keepdims=True), v[near])


WRONG = {
    1: [
        (lambda n, left, right: n * (left + right + 1), "the first queries have no left"),
        (
            lambda n, left, right: (
                n * (left + right) - left * (left + 1) // 2 - right * (right + 1) // 2
            ),
            "counts itself as well",
        ),
        (
            lambda n, left, right: n * (left + right + 1) - left * left - right * right,
            "triangle",
        ),
        (lambda n, left, right: "many", "gave str, expected real numbers"),
    ],
    2: [
        (attend(-5, 5), "ends at the query itself"),
        (attend(-4, 0), "window one short"),
        (attend(-5, -1), "Hint"),
        (attend(-6, 0), "window one long"),
        (from_below_zero, "must not start below 0"),
        (first_key_again, "Only rows 1 to 4 are wrong"),
        (full_matrix, "scores that no query may see"),
    ],
    3: [
        (dict.fromkeys(KINDS, 64), "Over budget"),
        (dict.fromkeys(KINDS, 1.5), "whole number"),
        ({"local": 16}, "a window for each of"),
        ([32] * 12, "a window for each of"),
        (dict.fromkeys(KINDS, 16) | {"large logits": 8}, "Where does"),
        (dict.fromkeys(KINDS, 32), "Where does a wider window help"),
    ],
    4: [
        ([1, 1, 1, 1], "heard twice"),
        ([1, 3, 3, 9], "comes twice"),
        ([1, 2, 4, 8], "step over all"),
        ([1, 3, 9], "four whole numbers"),
        (3, "four whole numbers"),
        (np.array([1, 2, 4, 8]), "step over all"),
    ],
}
