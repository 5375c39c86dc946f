"""To notebook 3, sparse masks."""

import numpy as np
import scipy

import refattn
from refattn import masks


def digits(i, b):
    return [i // b**l % b for l in range(40) if b**l <= i]


def both_ways(i, b):
    levels = 1
    while b**levels <= i:
        levels += 1
    return levels * (b - 1) + 1


def softmax(s):
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def blocks(x, l=16):
    return x.reshape(len(x) // l, l, x.shape[1])


def own_block(q, k, v):
    s = blocks(q) @ blocks(k).mT / q.dtype.type(q.shape[1] ** 0.5)
    return (softmax(s) @ blocks(v)).reshape(len(q), -1)


def summaries(q, k, v):
    return softmax(q @ k[15::16].T / q.dtype.type(q.shape[1] ** 0.5)) @ v[15::16]


def pieces(first, repeated):
    """Own block and one key of each, joined in one softmax."""

    def kernel(q, k, v):
        n, l = len(q), 16
        scale = q.dtype.type(q.shape[1] ** 0.5)
        near = (blocks(q) @ blocks(k).mT).reshape(n, l) / scale
        far = q @ k[first::l].T / scale
        if not repeated:
            far[np.arange(n), np.arange(n) // l] = -np.inf
        p = softmax(np.hstack([near, far]))
        return (blocks(p[:, :l]) @ blocks(v)).reshape(n, -1) + p[:, l:] @ v[first::l]

    return kernel


def full_matrix(q, k, v):
    i = np.arange(len(q))
    s = q @ k.T / q.dtype.type(q.shape[1] ** 0.5)
    s[(i[:, None] // 16 != i // 16) & (i % 16 != 15)] = -np.inf
    return softmax(s) @ v


def gathered(q, k, v):
    """Right, with a copy of its keys for every query."""
    i = np.arange(len(q))
    near = i[:, None] // 16 * 16 + np.arange(16)
    far = np.broadcast_to(i[15::16], (len(q), len(q) // 16))
    J = np.hstack([near, far])
    s = np.vecdot(q[:, None], k[J]) / q.dtype.type(q.shape[1] ** 0.5)
    s[:, 16:][far // 16 == i[:, None] // 16] = -np.inf
    return (softmax(s)[:, None] @ v[J])[:, 0]


def causal(q, k, v):
    i = np.arange(len(q))
    s = q @ k.T / q.dtype.type(q.shape[1] ** 0.5)
    s[(i[:, None] // 16 != i // 16) & (i % 16 != 15) | (i[:, None] < i)] = -np.inf
    return softmax(s) @ v


def corners():
    """One pair in each of 128 tiles."""
    seen = np.zeros((512, 512), bool)
    seen[::16, : 4 * 16 : 16] = True
    return scipy.sparse.csr_array(seen)


WRONG = {
    1: [
        (lambda i, b: sum(digits(i, b)), "sees itself"),
        (lambda i, b: sum(digits(i + 1, b)), "not in i + 1"),
        (lambda i, b: 1 + sum(x > 0 for x in digits(i, b)), "not only one"),
        (both_ways, "both directions"),
        (lambda i, b: i + 1, "Hint"),
    ],
    2: [
        (lambda n, l, c: n * l + c * n * (n // l - 1) // 2, "a triangle"),
        (
            lambda n, l, c: (
                n * (l + 1) // 2 + c * n * (n // l - 1) // 2 + n // l * (c * (c + 1) // 2)
            ),
            "counted already",
        ),
        (lambda n, l, c: n * l + c * (n // l - 1) * n, "both directions"),
        (lambda n, l, c: n * (l + 1) // 2 + n * (n // l - 1) // 2, "c summaries"),
        (lambda n, l, c: n * (l - 1) // 2 + c * n * (n // l - 1) // 2, "includes its diagonal"),
        (lambda n, l, c: n * (l + 1) // 2 + c * n * (n // l - 1), "every other block"),
        (lambda n, l, c: n**1.5, "Hint"),
    ],
    3: [
        (pieces(15, repeated=True), "counted twice"),
        (lambda q, k, v: (own_block(q, k, v) + summaries(q, k, v)) / 2, "two denominators"),
        (lambda q, k, v: own_block(q, k, v) + summaries(q, k, v), "sum to two"),
        (pieces(0, repeated=False), "takes the first"),
        (causal, "That is the causal mask"),
        (own_block, "own block only"),
        (summaries, "summaries only"),
        (full_matrix, "more than the pairs need"),
        (gathered, "a copy of k for every"),
    ],
    4: [
        (masks.random(512, 32, rng=0), "Over budget"),
        (np.ones((512, 512), bool), "csr_array"),
        (masks.local(256, 8), "shape (256, 256)"),
        (masks.local(512, 8), "half empty"),
        (masks.block_diagonal(512, 32), "tiles left"),
        (masks.block_diagonal(512, 64), "near the diagonal"),
        (corners(), "half empty"),
        (refattn.softmax_attention, "csr_array"),
    ],
}
