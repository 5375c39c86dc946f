"""The shifts of Performer's exponents as CUDA kernels.

A feature's shift is the largest exponent of the keys it has seen: of all in the full form, of those
up to the end of a span in the causal form. A query's own shift is the largest of its exponents with
the keys', so that one term of its denominator is about 1.

Inside a span a query does not see the keys after it. While their exponents are at most ``most``
above those it sees, nothing is lost; a span where they rise further is marked, and its pairs are
computed each by itself.
"""

import functools
import math

import numpy as np

from refattn.gpu import cuda
from refattn.linear.cuda_maps import TRIG, real


def most(kind):
    """How far apart, in powers of e: half as far as exp reaches, so that what is lost is that far
    below a row's largest term."""
    return kind(280 if kind is np.float64 else 35)


@functools.cache
def make_tops(kind):
    """``tops`` and ``first`` (H, spans, w): the largest exponent of each span's visible keys, and
    that of the first of them; -inf without any.

    Launch: 128 threads a block, one for each (head, span, feature), neighbours side by side.
    """
    none = kind(-np.inf)

    @cuda.jit
    def tops_of(b, seen, heads, span, tops, first):
        H, spans, w = tops.shape
        t = cuda.grid(1)
        if t < H * spans * w:
            row = t // w
            f = t - row * w
            h = row // spans
            s = row - h * spans
            own, mask = heads[h, 1], heads[h, 3]
            top, low, begun = none, none, False
            for j in range(s * span, min(s * span + span, b.shape[1])):
                if seen[mask, j] != 0:
                    x = b[own, j, f]
                    if not begun:
                        low, begun = x, True
                    if x > top:  # NaN stays with those who see it
                        top = x
            tops[h, s, f] = top
            first[h, s, f] = low

    return tops_of


@functools.cache
def make_running(kind):
    """Shifts from span to span: ``tops`` (H, spans, w) become the largest so far, ``base`` those
    before each span, ``decay`` = exp(base - tops); ``careful`` (H, spans) marks where the first
    keys are too far below.

    Launch: 128 threads a block, one for each (head, feature).
    """
    none, zero, apart = kind(-np.inf), kind(0), most(kind)

    @cuda.jit
    def run(first, tops, base, decay, careful):
        H, spans, w = tops.shape
        t = cuda.grid(1)
        if t < H * w:
            h = t // w
            f = t - h * w
            carry = none
            for s in range(spans):
                top = max(carry, tops[h, s, f])
                low = first[h, s, f]
                if carry > low:
                    low = carry
                if top > none and top - low > apart:
                    careful[h, s] = 1  # by whoever finds it: the same number
                base[h, s, f] = carry
                tops[h, s, f] = top
                decay[h, s, f] = math.exp(carry - top) if top > none else zero
                carry = top

    return run


@functools.cache
def make_lines(kind, of, causal, side):
    """``line`` (H, n): less the largest exponent of each query with the keys it sees, 0 if none.

    Launch: one block of (side, side) threads for each (head, side queries); the threads of a row
    share features, or keys where all features have one exponent.
    """
    none, zero, T = kind(-np.inf), kind(0), real(kind)

    @cuda.jit
    def lines(a, b, seen, heads, base, tops, careful, span, line):
        best = cuda.shared.array((side, side), T)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        H, n = line.shape
        tiles = (n + side - 1) // side
        h = cuda.blockIdx.x // tiles
        i = (cuda.blockIdx.x - h * tiles) * side + ty
        s = i // span
        top = none
        if i < n:
            own, keys, mask = heads[h, 0], heads[h, 1], heads[h, 3]
            if of == TRIG:
                top = base[h, s, 0] if causal else tops[h, s, 0]
                if causal:
                    for j in range(s * span + tx, i + 1, side):
                        if seen[mask, j] != 0 and b[keys, j, 0] > top:
                            top = b[keys, j, 0]
            else:
                each = causal and careful[h, s] != 0
                for f in range(tx, a.shape[2], side):
                    x = a[own, i, f]
                    shift = base[h, s, f] if each else tops[h, s, f]
                    if x + shift > top:
                        top = x + shift
                    if each:
                        for j in range(s * span, i + 1):
                            if seen[mask, j] != 0 and x + b[keys, j, f] > top:
                                top = x + b[keys, j, f]
        best[ty, tx] = top
        cuda.syncthreads()
        if tx == 0 and i < n:
            for k in range(side):
                if best[ty, k] > top:
                    top = best[ty, k]
            line[h, i] = -top if top > none else zero

    return lines
