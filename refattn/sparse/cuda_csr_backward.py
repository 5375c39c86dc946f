"""Gradient of attention by csr masks on a GPU: dq by the rows of the mask, dk and dv by columns.

Both compute the weights again from lse; ``cuda_csr`` says how a block walks its pairs.

    dp_ij = dy_i . v_j                 p_ij = exp(s_ij - lse_i)
    ds_ij = scale p_ij (dp_ij - delta_i),    delta_i = dy_i . y_i
"""

import functools
import math

import numba
import numpy as np

from refattn.gpu import cuda
from refattn.sparse.cuda_csr import BATCH, MOST, PITCH, TOGETHER, make_dots, make_gather, make_total


@functools.cache
def make_by_rows(columns, kind):
    """The kernel of dq and delta.

    Grid (heads * n, slices of d), block 32: a row i of one head, and of dq_i = sum_j ds_ij k_j the
    columns that the slice holds, ``columns`` a thread.
    """
    zero, low, number = kind(0), kind(-np.inf), numba.from_dtype(np.dtype(kind))
    dots, total, gather = make_dots(kind), make_total(kind), make_gather(columns, kind)

    @cuda.jit
    def by_rows(dY, Q, K, V, heads, indptr, indices, scale, Y, lse, dQ, delta):
        S = cuda.shared.array((BATCH, PITCH), number)  # q . k
        D = cuda.shared.array((BATCH, PITCH), number)  # dy . v
        P = cuda.shared.array(BATCH, number)
        J = cuda.shared.array(BATCH, numba.int32)
        sums = cuda.local.array(TOGETHER, number)
        acc = cuda.local.array(columns, number)
        t = cuda.threadIdx.x
        h = cuda.blockIdx.x // dQ.shape[1]
        i = cuda.blockIdx.x - h * dQ.shape[1]
        dy, q, k, v = dY[h, i], Q[heads[h, 0], i], K[heads[h, 1]], V[heads[h, 2]]
        c0 = cuda.blockIdx.y * (columns * BATCH) + t
        for s in range(columns):
            acc[s] = zero
        part = zero
        for c in range(t, dy.shape[0], BATCH):
            part += dy[c] * Y[h, i, c]
        P[t] = part
        cuda.syncthreads()
        delta_i, lse_i = total(P), lse[h, i]
        for start in range(indptr[i], indptr[i + 1], BATCH):
            count = min(BATCH, indptr[i + 1] - start)
            cuda.syncthreads()  # the last batch's J and P have been read
            J[t] = indices[start + t if t < count else start]
            cuda.syncthreads()
            dots(q, k, J, count, t, sums, S)
            dots(dy, v, J, count, t, sums, D)
            cuda.syncthreads()
            if t < count and lse_i != low:
                p = kind(math.exp(scale * total(S[t]) - lse_i))
                P[t] = scale * p * (total(D[t]) - delta_i)
            else:
                P[t] = zero
            cuda.syncthreads()
            gather(acc, P, k, J, count, c0)
        for s in range(columns):
            if c0 + s * BATCH < dQ.shape[2]:
                dQ[h, i, c0 + s * BATCH] = acc[s]
        if t == 0 and cuda.blockIdx.y == 0:
            delta[h, i] = delta_i

    return by_rows


@functools.cache
def make_by_columns(columns, kind):
    """The kernel of dk and dv.

    Grid (heads * m, slices of d and e), block 32: a key j of one head, and of dk_j = sum_i ds_ij
    q_i and dv_j = sum_i p_ij dy_i the columns that the slice holds, ``columns`` of each a thread.
    ``indptr`` and ``indices`` are those of the transposed mask: the queries that see j.
    """
    zero, low, number = kind(0), kind(-np.inf), numba.from_dtype(np.dtype(kind))
    dots, total, gather = make_dots(kind), make_total(kind), make_gather(columns, kind)

    @cuda.jit
    def by_columns(dY, Q, K, V, heads, indptr, indices, scale, lse, delta, dK, dV):
        S = cuda.shared.array((BATCH, PITCH), number)  # q . k
        D = cuda.shared.array((BATCH, PITCH), number)  # dy . v
        P = cuda.shared.array(BATCH, number)
        dS = cuda.shared.array(BATCH, number)
        J = cuda.shared.array(BATCH, numba.int32)
        sums = cuda.local.array(TOGETHER, number)
        acc_k = cuda.local.array(columns, number)
        acc_v = cuda.local.array(columns, number)
        t = cuda.threadIdx.x
        h = cuda.blockIdx.x // dK.shape[1]
        j = cuda.blockIdx.x - h * dK.shape[1]
        dy, q, k, v = dY[h], Q[heads[h, 0]], K[heads[h, 1], j], V[heads[h, 2], j]
        c0 = cuda.blockIdx.y * (columns * BATCH) + t
        for s in range(columns):
            acc_k[s] = zero
            acc_v[s] = zero
        for start in range(indptr[j], indptr[j + 1], BATCH):
            count = min(BATCH, indptr[j + 1] - start)
            cuda.syncthreads()  # the last batch's J, P and dS have been read
            i = indices[start + t if t < count else start]
            J[t] = i
            cuda.syncthreads()
            dots(k, q, J, count, t, sums, S)
            dots(v, dy, J, count, t, sums, D)
            cuda.syncthreads()
            if t < count and lse[h, i] != low:
                p = kind(math.exp(scale * total(S[t]) - lse[h, i]))
                P[t] = p
                dS[t] = scale * p * (total(D[t]) - delta[h, i])
            else:
                P[t] = zero
                dS[t] = zero
            cuda.syncthreads()
            gather(acc_k, dS, q, J, count, c0)
            gather(acc_v, P, dy, J, count, c0)
        for s in range(columns):
            c = c0 + s * BATCH
            if c < dK.shape[2]:
                dK[h, j, c] = acc_k[s]
            if c < dV.shape[2]:
                dV[h, j, c] = acc_v[s]

    return by_columns


def instances():
    """What ``scripts/cuda_compile.py`` compiles."""
    for kind, columns in ((np.float32, 2), (np.float32, MOST), (np.float64, 2)):
        number = numba.from_dtype(np.dtype(kind))
        x, row, ints = number[:, :, ::1], number[:, ::1], numba.int32[:, ::1]
        given = (x, x, x, x, ints, numba.int64[::1], numba.int32[::1], number)
        width = f"{columns * BATCH} columns, {number}"
        for label, make, rest in (
            ("csr dq", make_by_rows, (x, row, x, row)),
            ("csr dk, dv", make_by_columns, (row, row, x, x)),
        ):
            kernel = make(columns, kind).py_func
            yield f"{label}, {width}", kernel, (*given, *rest), kind is np.float32, BATCH
