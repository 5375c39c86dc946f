"""Attention by csr masks on a GPU: what its kernels share, and the forward kernel.

A block of 32 threads, one warp, serves one row of the mask and walks its stored pairs in batches
of 32. Dot products are cut by columns: thread t takes columns t, t + 32, ..., so that neighbouring
threads read a row of k or v at neighbouring addresses; their parts go through shared memory, and
thread t then holds the score of pair t. Sums over pairs are cut by columns again.

There are no atomics and no shuffles. Rows of the mask give y and dq, its columns (the transposed
mask) dk and dv. What is not stored is not read, so a NaN there cannot leak. One long row is the
work of one block: masks with rows that see everything leave most of the device waiting for these.
"""

import functools
import math

import numba
import numpy as np

from refattn.gpu import cuda

BATCH = 32  # threads of a block, and pairs of a batch
TOGETHER = 8  # pairs whose dot products a thread adds to at once: a number of x serves all
PITCH = BATCH + 1  # of a row of scores in shared memory, so that no two threads meet in one bank
AHEAD = 4  # pairs whose rows are read before any of them is used
MOST = 8  # numbers of a row that a thread sums up: with more than 32 * 8 columns, more blocks


@functools.cache
def make_dots(kind):
    """Device function: part t of x . B[j] for the keys j of a batch, into column t of ``S``.

    ``sums`` is room for TOGETHER numbers. No device function here names ``cuda``: Numba's simulator
    puts its own in that name's place, and back while other threads are still inside.
    """
    zero = kind(0)

    @cuda.jit(device=True)
    def dots(x, B, J, count, t, sums, S):
        for first in range(0, count, TOGETHER):
            for u in range(TOGETHER):
                sums[u] = zero
            for c in range(t, x.shape[0], BATCH):
                for u in range(TOGETHER):  # past count: J names a key that is there
                    sums[u] += x[c] * B[J[first + u], c]
            for u in range(TOGETHER):
                S[first + u, t] = sums[u]

    return dots


@functools.cache
def make_total(kind):
    """Device function: the sum of 32 numbers in shared memory, in their order."""
    zero = kind(0)

    @cuda.jit(device=True)
    def total(x):
        found = zero
        for c in range(BATCH):
            found += x[c]
        return found

    return total


@functools.cache
def make_gather(columns, kind):
    """Device function: acc[s] += sum over the pairs of P[u] * B[J[u], column s of thread t].

    Every row is read without a condition, several ahead of their use; what does not count (pairs
    past ``count``) is selected away, not multiplied by 0, since it may be a NaN.
    """
    zero = kind(0)

    @cuda.jit(device=True)
    def gather(acc, P, B, J, count, start):
        last = B.shape[1] - 1
        for first in range(0, count, AHEAD):
            for u in range(AHEAD):
                weight = P[first + u]
                j = J[first + u]
                for s in range(columns):
                    term = weight * B[j, min(start + s * BATCH, last)]
                    acc[s] += term if first + u < count else zero

    return gather


@functools.cache
def make_forward(columns, kind):
    """The kernel of y and lse.

    Grid (heads * n, slices of e), block 32: a row i of one head, and of its output the columns
    that the slice holds, ``columns`` a thread. Scores are computed again in each slice.

    Running maximum and sum as in ``softmax.steps.online``, a batch of pairs at a time.
    """
    zero, low, number = kind(0), kind(-np.inf), numba.from_dtype(np.dtype(kind))
    dots, total, gather = make_dots(kind), make_total(kind), make_gather(columns, kind)

    @cuda.jit
    def forward(Q, K, V, heads, indptr, indices, scale, Y, lse):
        S = cuda.shared.array((BATCH, PITCH), number)
        P = cuda.shared.array(BATCH, number)
        J = cuda.shared.array(BATCH, numba.int32)
        sums = cuda.local.array(TOGETHER, number)
        acc = cuda.local.array(columns, number)
        t = cuda.threadIdx.x
        h = cuda.blockIdx.x // Y.shape[1]
        i = cuda.blockIdx.x - h * Y.shape[1]
        q, k, v = Q[heads[h, 0], i], K[heads[h, 1]], V[heads[h, 2]]
        c0 = cuda.blockIdx.y * (columns * BATCH) + t
        for s in range(columns):
            acc[s] = zero
        top = low
        l = zero  # of the pairs that thread t held
        for start in range(indptr[i], indptr[i + 1], BATCH):
            count = min(BATCH, indptr[i + 1] - start)
            cuda.syncthreads()  # the last batch's J and P have been read
            J[t] = indices[start + t if t < count else start]
            cuda.syncthreads()
            dots(q, k, J, count, t, sums, S)
            cuda.syncthreads()
            score = scale * total(S[t]) if t < count else low
            P[t] = score
            cuda.syncthreads()
            new = top
            for u in range(BATCH):
                new = max(new, P[u])
            shift = new if new > low else zero  # -inf - -inf is NaN
            keep = kind(math.exp(top - shift))
            p = kind(math.exp(score - shift))
            cuda.syncthreads()
            P[t] = p
            cuda.syncthreads()
            l = keep * l + p
            for s in range(columns):
                acc[s] *= keep
            gather(acc, P, v, J, count, c0)
            top = new
        cuda.syncthreads()
        P[t] = l
        cuda.syncthreads()
        l = total(P)
        for s in range(columns):
            if c0 + s * BATCH < Y.shape[2]:
                Y[h, i, c0 + s * BATCH] = zero if l == zero else acc[s] / l
        if t == 0 and cuda.blockIdx.y == 0:
            lse[h, i] = low if l == zero else top + kind(math.log(l))

    return forward


def instances():
    """What ``scripts/cuda_compile.py`` compiles."""
    for kind, columns in ((np.float32, 2), (np.float32, MOST), (np.float64, 2)):
        number = numba.from_dtype(np.dtype(kind))
        x, ints = number[:, :, ::1], numba.int32[:, ::1]
        pairs = numba.int64[::1], numba.int32[::1]
        signature = (x, x, x, ints, *pairs, number, x, number[:, ::1])
        kernel = make_forward(columns, kind).py_func
        label = f"csr forward, {columns * BATCH} columns, {number}"
        yield label, kernel, signature, kind is np.float32, BATCH
