"""Causal linear attention on CUDA in two steps, for reading; ``cuda_tiles`` is the third.

The recurrence of each head, with phi = elu + 1:

    S += phi(k) v^T,   z += phi(k),   y = phi(q)^T S / phi(q)^T z.

Step 1, ``make_recurrent``: one block a head, one thread a column of S. A thread needs no column but
its own, so S and z stay with the threads and only rows are read. But each position waits for the
one before it, behind two barriers, and one block a head leaves most of a GPU idle.

Step 2, ``make_chunked``: C positions at a time. What they say to each other is a small matrix,
A = tril(phi(q) phi(k)^T), which all threads make at once; the state is read and added to once a
chunk. So there are three barriers a chunk, not two a position.

Step 3, ``refattn.linear.cuda_tiles``: the sequence is cut into spans, whose states are summed all
at the same time and then added up in order, so that spans wait for each other only there; and a
thread keeps a tile of sums in registers, so that a number from shared memory serves four products.
"""

import functools
import math

import numpy as np

from refattn import gpu
from refattn.gpu import cuda
from refattn.linear.cuda_maps import real


@cuda.jit(device=True)
def elu(x, one):
    """elu(x) + 1."""
    return x + one if x > 0 else math.exp(x)


@functools.cache
def make_recurrent(kind, r, e):
    """Launch: grid (heads), block (e threads). Thread c owns column c of S, and a copy of z."""
    T, zero, one = real(kind), kind(0), kind(1)

    @cuda.jit
    def recurrent(q, k, v, y):
        phi_q = cuda.shared.array(r, T)
        phi_k = cuda.shared.array(r, T)
        S = cuda.local.array(r, T)
        z = cuda.local.array(r, T)
        h, c = cuda.blockIdx.x, cuda.threadIdx.x
        for f in range(r):
            S[f] = zero
            z[f] = zero
        for i in range(q.shape[1]):
            cuda.syncthreads()  # everyone is done with the features of the position before
            for f in range(c, r, e):
                phi_q[f] = elu(q[h, i, f], one)
                phi_k[f] = elu(k[h, i, f], one)
            cuda.syncthreads()
            num, den = zero, zero
            for f in range(r):
                S[f] += phi_k[f] * v[h, i, c]
                z[f] += phi_k[f]
                num += phi_q[f] * S[f]
                den += phi_q[f] * z[f]
            y[h, i, c] = num / den if den != zero else zero

    return recurrent


@functools.cache
def make_chunked(kind, r, e, C):
    """Launch as in step 1. In shared memory: a chunk's features, and its weights A (C, C)."""
    T, zero, one = real(kind), kind(0), kind(1)

    @cuda.jit
    def chunked(q, k, v, y):
        phi_q = cuda.shared.array((C, r), T)
        phi_k = cuda.shared.array((C, r), T)
        A = cuda.shared.array((C, C), T)
        S = cuda.local.array(r, T)
        z = cuda.local.array(r, T)
        h, c, n = cuda.blockIdx.x, cuda.threadIdx.x, q.shape[1]
        for f in range(r):
            S[f] = zero
            z[f] = zero
        for start in range(0, n, C):
            count = min(C, n - start)
            cuda.syncthreads()
            for t in range(c, count * r, e):
                i, f = t // r, t % r
                phi_q[i, f] = elu(q[h, start + i, f], one)
                phi_k[i, f] = elu(k[h, start + i, f], one)
            cuda.syncthreads()
            for t in range(c, count * count, e):  # A = tril(phi(q) phi(k)^T)
                i, j = t // count, t % count
                if j <= i:
                    weight = zero
                    for f in range(r):
                        weight += phi_q[i, f] * phi_k[j, f]
                    A[i, j] = weight
            cuda.syncthreads()
            for i in range(count):  # num = A v + phi(q) S, den = A 1 + phi(q) z
                num, den = zero, zero
                for j in range(i + 1):
                    num += A[i, j] * v[h, start + j, c]
                    den += A[i, j]
                for f in range(r):
                    num += phi_q[i, f] * S[f]
                    den += phi_q[i, f] * z[f]
                y[h, start + i, c] = num / den if den != zero else zero
            for j in range(count):  # S += phi(k)^T v, z += the sum of phi(k)
                for f in range(r):
                    S[f] += phi_k[j, f] * v[h, start + j, c]
                    z[f] += phi_k[j, f]

    return chunked


def causal_linear_attention(q, k, v, *, step, chunk=16):
    """Step 1 or 2 on NumPy arrays q, k (H, n, d) and v (H, n, e), e at most 1024: y (H, n, e)."""
    gpu.require()
    H, n, d = q.shape
    kind, e = q.dtype.type, v.shape[-1]
    kernel = make_recurrent(kind, d, e) if step == 1 else make_chunked(kind, d, e, chunk)
    y = np.empty((H, n, e), kind)
    gpu.launch(kernel, H, e, [np.ascontiguousarray(x) for x in (q, k, v)], (y,))
    return y
