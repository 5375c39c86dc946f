"""Softmax attention as CUDA kernels, step by step: to be read before ``cuda_tiles``.

=====  =====================================  ==================================================
step   what a thread owns                     what it buys
=====  =====================================  ==================================================
1      one query                              n threads at work in place of one; but each of them
                                              reads every key and value from global memory: n m
                                              (d + e) numbers in all
2      one query of a tile of ``ROWS``        keys and values come once for a whole tile, into
                                              shared memory: ``ROWS`` times fewer reads of them. Its
                                              own query a thread still reads for every key, from
                                              the cache if all goes well
3      4 x 4 pairs of a tile of 64 x 32, in   4 x 4 products for 4 + 4 numbers from shared memory,
       ``cuda_tiles``                         where step 2 loads a number for each product
=====  =====================================  ==================================================

All three go over the keys once, by the online softmax: with the largest score so far as ``top``,

    total = total exp(old top - top) + exp(s - top)
    acc   = acc   exp(old top - top) + exp(s - top) v
"""

import functools
import math

import numba
import numpy as np

from refattn import checks, gpu
from refattn.gpu import cuda

ROWS = 32  # queries of a tile and threads of a block: a warp
KEYS = 16  # keys of a tile


def softmax_attention(q, k, v, *, step=2, causal=False, scale=None):
    """Softmax attention of NumPy arrays q (n, d), k (m, d) and v (m, e) by step 1 or 2.

    Step 3 is ``refattn.softmax_attention(..., backend="cuda")``.
    """
    gpu.require()
    if step not in (1, 2):
        raise ValueError(f"step is {step!r}; expected 1 or 2")
    q, k, v, dtype = checks.qkv(q, k, v)
    if q.ndim > 2 or k.ndim > 2 or v.ndim > 2:
        raise ValueError(f"q has shape {q.shape}; expected (n, d): these steps take one head")
    n, m = q.shape[0], k.shape[0]
    seen = np.full(n, m, np.int32)  # keys that each query sees: the first ones
    if checks.flag("causal", causal):
        seen = np.clip(np.arange(m - n + 1, m + 1), 0, m).astype(np.int32)
    y = np.zeros((n, v.shape[1]), q.dtype)
    kind = q.dtype.type
    make = make_row_by_row if step == 1 else make_tile_by_tile
    kernel = make(q.shape[1], max(1, v.shape[1]), kind)
    inputs = *(np.ascontiguousarray(x) for x in (q, k, v)), seen
    factor = kind(checks.scale(scale, q.shape[1]))
    if m and v.shape[1]:
        gpu.launch(kernel, -(-n // ROWS), ROWS, (*inputs, factor), (y,))
    return y.astype(dtype, copy=False)


@functools.cache
def make_row_by_row(d, e, kind):
    """Step 1: a thread for each query."""
    number = numba.float32 if kind is np.float32 else numba.float64
    zero, least = kind(0), kind(-np.inf)

    @cuda.jit
    def row_by_row(q, k, v, seen, scale, y):
        """y (n, e) is written. Grid: ROWS threads a block, thread i for query i."""
        acc = cuda.local.array(e, number)  # too large for registers where e is large
        i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if i >= len(q):
            return
        top, total = least, zero
        for c in range(e):
            acc[c] = zero
        for j in range(seen[i]):
            s = zero
            for c in range(d):
                s += q[i, c] * k[j, c]
            s *= scale
            higher = max(top, s)
            base = higher if higher > least else zero
            share, p = kind(math.exp(top - base)), kind(math.exp(s - base))
            total = total * share + p
            for c in range(e):
                acc[c] = acc[c] * share + p * v[j, c]
            top = higher
        for c in range(e):
            y[i, c] = acc[c] / total if total != zero else zero

    return row_by_row


@functools.cache
def make_tile_by_tile(d, e, kind):
    """Step 2: the threads of a block bring tiles of keys and values that all of them use."""
    number = numba.float32 if kind is np.float32 else numba.float64
    room = gpu.SHARED // np.dtype(kind).itemsize
    keys = min(KEYS, room // (d + e))
    if keys < 1:
        raise ValueError(f"one key and value have {d + e} columns; expected at most {room}")
    zero, least, rows = kind(0), kind(-np.inf), ROWS

    @cuda.jit
    def tile_by_tile(q, k, v, seen, scale, y):
        """y (n, e) is written. Grid: a block of ROWS threads for each tile of ROWS queries."""
        ks = cuda.shared.array((keys, d), number)
        vs = cuda.shared.array((keys, e), number)
        acc = cuda.local.array(e, number)
        thread = cuda.threadIdx.x
        i0 = cuda.blockIdx.x * rows
        i = min(i0 + thread, len(q) - 1)  # threads past the last query help to bring tiles
        last = seen[min(i0 + rows, len(q)) - 1]  # the last query of a tile sees most
        top, total = least, zero
        for c in range(e):
            acc[c] = zero
        for j0 in range(0, last, keys):
            cuda.syncthreads()  # everyone has finished with the tile before
            for t in range(thread, keys * d, rows):
                if j0 + t // d < last:
                    ks[t // d, t % d] = k[j0 + t // d, t % d]
            for t in range(thread, keys * e, rows):
                if j0 + t // e < last:
                    vs[t // e, t % e] = v[j0 + t // e, t % e]
            cuda.syncthreads()  # the tile is there
            for j in range(min(keys, seen[i] - j0)):
                s = zero
                for c in range(d):
                    s += q[i, c] * ks[j, c]
                s *= scale
                higher = max(top, s)
                base = higher if higher > least else zero
                share, p = kind(math.exp(top - base)), kind(math.exp(s - base))
                total = total * share + p
                for c in range(e):
                    acc[c] = acc[c] * share + p * vs[j, c]
                top = higher
        if i0 + thread < len(q):
            for c in range(e):
                y[i, c] = acc[c] / total if total != zero else zero

    return tile_by_tile
