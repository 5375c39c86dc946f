"""To notebook 11, kernels."""

import math

import numpy as np

from refattn.gpu import cuda


def no_guard(q, k, scale, s):
    i, j = cuda.grid(2)
    total = np.float32(0)
    for c in range(q.shape[1]):
        total += q[i, c] * k[j, c]
    s[i, j] = scale * total


def half_a_guard(q, k, scale, s):
    i, j = cuda.grid(2)
    if i < s.shape[0]:
        total = np.float32(0)
        for c in range(q.shape[1]):
            total += q[i, c] * k[j, c]
        s[i, j] = scale * total


def no_scale(q, k, scale, s):
    i, j = cuda.grid(2)
    if i < s.shape[0] and j < s.shape[1]:
        total = np.float32(0)
        for c in range(q.shape[1]):
            total += q[i, c] * k[j, c]
        s[i, j] = total


def first_block_only(q, k, scale, s):
    i, j = cuda.threadIdx.x, cuda.threadIdx.y
    if i < s.shape[0] and j < s.shape[1]:
        total = np.float32(0)
        for c in range(q.shape[1]):
            total += q[i, c] * k[j, c]
        s[i, j] = scale * total


def rows_at_once(q, k, scale, s):
    i, j = cuda.grid(2)
    if i < s.shape[0] and j < s.shape[1]:
        s[i, j] = scale * (q[i] * k[j]).sum()


def make_row_max(start=-np.inf, stride=32, between=True, inside=False, tree=True):
    """Variants of a tree: what a barrier that is missing or in a branch does."""

    def row_max(s, y):
        best = cuda.shared.array(32, np.float32)
        row, t = cuda.blockIdx.x, cuda.threadIdx.x
        largest = np.float32(start)
        for j in range(t, s.shape[1], stride):
            largest = max(largest, s[row, j])
        best[t] = largest
        if between:
            cuda.syncthreads()
        half = 16
        while tree and half > 0:
            if t < half:
                best[t] = max(best[t], best[t + half])
                if inside:
                    cuda.syncthreads()
            if between and not inside:
                cuda.syncthreads()
            half //= 2
        if t == 0:
            largest = best[0]
            for x in range(0 if tree else 32):
                largest = max(largest, best[x])
            y[row] = largest

    return row_max


def all_by_each(s, y):
    row, largest = cuda.blockIdx.x, -np.inf
    for j in range(s.shape[1]):
        largest = max(largest, s[row, j])
    y[row] = largest


def halves_with_a_slash(s, y):
    best = cuda.shared.array(32, np.float32)
    row, t = cuda.blockIdx.x, cuda.threadIdx.x
    best[t] = s[row, t] if t < s.shape[1] else -np.inf
    half = 16
    while half > 0:
        cuda.syncthreads()
        if t < half:
            best[t] = max(best[t], best[t + half])
        half /= 2
    y[row] = best[0]


def by_atomics(s, y):
    row, t = cuda.blockIdx.x, cuda.threadIdx.x
    for j in range(t, s.shape[1], 32):
        cuda.atomic.max(y, row, s[row, j])


WRONG = {
    1: [
        (no_guard, "outside its shape"),
        (half_a_guard, "a guard must keep such a thread from it"),
        (no_scale, "not scaled"),
        (first_block_only, "are NaN"),
        (rows_at_once, "one number"),
        ("q k", "gave str, expected real numbers"),
    ],
    2: [
        (make_row_max(between=False), "order in which threads run"),
        (make_row_max(inside=True), "all threads of a block must come"),
        (make_row_max(start=0.0), "start from -inf"),
        (make_row_max(stride=1000), "Only the first 32 columns"),
        (make_row_max(tree=False), "one thread reads all"),
        (all_by_each, "or each reads all"),
        (halves_with_a_slash, "divide with //"),
        (by_atomics, "cuda.atomic is not to be had"),
    ],
    3: [
        (
            lambda n, d, e, rows: n * d + math.ceil(n / rows) * n * (d + e),
            "This is (3) as it stands",
        ),
        (
            lambda n, d, e, rows: (
                n * d + sum((b + 1) * rows for b in range(math.ceil(n / rows))) * (d + e)
            ),
            "no key comes after",
        ),
        (
            lambda n, d, e, rows: sum(min(i + rows, n) for i in range(0, n, rows)) * (d + e),
            "queries are read as well",
        ),
        (
            lambda n, d, e, rows: n * d + sum(min(i + rows, n) for i in range(0, n, rows)) * 2 * d,
            "a value has e",
        ),
        (lambda n, d, e, rows: n * d + n * (n + 1) // 2 * (d + e), "reads a key once"),
        (lambda n, d, e, rows: n * d + sum(range(1, n + 1, rows)) * (d + e), "Hint"),
        (lambda n, d, e, rows: n * n / 2 * (d + e), "Hint"),
    ],
    4: [
        (lambda width: math.gcd(width, 32), "how many threads meet"),
        (lambda width: 32 if width % 32 else 1, "try 36"),
        (lambda width: 32 if width % 2 else 16, "odd width"),
        (lambda width: width % 32, "Hint"),
    ],
    5: [
        ((256, 16, 32, 4), "bytes of shared memory"),
        ((64, 32, 8, 2), "registers; it can have"),
        ((32, 32, 32, 32), "powers of two"),
        ((128, 16, 64, 4), "larger patch"),
        ((64, 32, 16, 8), "room for more rows"),
        ((32, 32, 8, 8), "room for more rows"),
        ((64, 32), "four whole numbers"),
    ],
}
