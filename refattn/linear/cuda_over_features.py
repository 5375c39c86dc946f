"""Attention over features on CUDA: which kernels run one after another, and on what."""

import math
from typing import Any, NamedTuple

import numpy as np

from refattn import gpu
from refattn.linear.cuda_maps import POSITIVE, Sizes
from refattn.linear.cuda_tiles import make_read, make_scan, make_sums
from refattn.linear.cuda_tiles_backward import make_pull

BLOCKS = 1024  # that the keys of all heads are cut into in the full form, so that a GPU is busy


class Shifts(NamedTuple):
    """Exponents of a map of exponentials: before, in and from span to span, (H, spans, r); which
    spans need care, (H, spans); those of rows, (H, n) and (., m)."""

    base: Any
    tops: Any
    decay: Any
    careful: Any
    q_line: Any
    k_line: Any


class Work(NamedTuple):
    """q, k, v (., n, .) and seen (., m) of 0 and 1, which of each belongs to which head, the map,
    and how it is cut."""

    xp: Any
    of: int
    q: Any
    k: Any
    v: Any
    seen: Any
    heads: Any
    sizes: Sizes

    @property
    def kind(self):
        return gpu.dtype_of(self.v).type

    @property
    def shape(self):
        """H, n, m, r, e."""
        return (
            len(self.heads), self.q.shape[1], self.k.shape[1], self.q.shape[2], self.v.shape[2]
        )  # fmt: skip


def no_shifts(work):
    """Stand-ins, for a map without exponents."""
    none = gpu.empty(work.xp, work.q, (1, 1, 1), work.kind, 0)
    careful = gpu.empty(work.xp, work.q, (1, 1), np.int32, 0)
    return Shifts(none, none, none, careful, none[0], none[0])


def attend(work, start, causal, normalize, shifts):
    """y (H, n, e), its denominators (H, n) if it has any, and S and z (H, ...) after all keys;
    ``start`` is a state (H, ...)."""
    state, last = states(work, start, causal, shifts)
    return *outputs(work, state, causal, normalize, shifts), last


def attend_vjp(work, dy, start, causal, normalize, dstate, shifts):
    """(dq, dk, dv) (H, ...), those of q and k with respect to what features are made of, and the
    gradient of ``start``; ``dstate`` is that of the S and z that came last."""
    state, _ = states(work, start, causal, shifts)
    pulls = dy, gpu.empty(work.xp, dy, dy.shape[:-1], work.kind, 0)
    if normalize:
        y, den = outputs(work, state, causal, True, shifts)
        pulls = quotient_vjp(work.xp, dy, y, den)
    queries, keys = query_side(work, shifts, *pulls), key_side(work, shifts)
    dq = pull(work, (queries, keys), state, causal, shifts, query=True)
    R, first = gathered(work, queries, dstate, causal, shifts)
    dk = pull(work, (keys, queries), R, causal, shifts, query=False)
    dv, _ = read(work, (keys, queries), R, causal, False, shifts, query=False)
    return (dq, dk, dv), first


def states(work, start, causal, shifts):
    """S and z (H, spans, ...) that each span of queries reads, and those after all keys."""
    keys = key_side(work, shifts)
    if causal:
        own = sums(work, keys, shifts.tops, work.sizes.span, query=False)
        return scanned(work, own, start, shifts.decay, reverse=False)
    last = summed(work, keys, start, shifts.tops, query=False)
    return tuple(x[:, None] for x in last), last


def gathered(work, queries, dstate, causal, shifts):
    """R and u (H, spans, ...) that each span of keys gets, and those of all queries."""
    if causal:
        own = sums(work, queries, shifts.base, work.sizes.span, query=True)
        return scanned(work, own, dstate, shifts.decay, reverse=True)
    last = summed(work, queries, dstate, shifts.tops, query=True)
    return tuple(x[:, None] for x in last), last


def outputs(work, state, causal, normalize, shifts):
    """y and its denominators."""
    sides = query_side(work, shifts), key_side(work, shifts)
    return read(work, sides, state, causal, normalize, shifts, query=True)


def quotient_vjp(xp, dy, y, den):
    """dnum and dden of y = num / den; 0 where den is 0."""
    zero = den == 0
    with np.errstate(invalid="ignore", over="ignore"):
        dnum = dy / xp.where(zero, xp.ones_like(den), den)[..., None]
        dnum = xp.where(zero[..., None], xp.zeros_like(dnum), dnum)
        return dnum, -xp.sum(dnum * y, axis=-1)


def query_side(work, shifts, dnum=None, dden=None):
    """The queries as kernels take them; the forward pass asks for no gradients."""
    own = gpu.like(work.xp, work.q, np.arange(len(work.heads), dtype=np.int32))
    none = gpu.empty(work.xp, work.q, (1, 1, 1), work.kind, 0)
    at = work.xp.stack([work.heads[:, 0], own, own, own], axis=1)
    values = (none, none[0]) if dnum is None else (dnum, dden)
    return work.q, shifts.q_line, *values, at


def key_side(work, shifts):
    """The keys as kernels take them."""
    columns = [work.heads[:, c] for c in (1, 1, 2, 3)]
    return work.k, shifts.k_line, work.v, work.seen, work.xp.stack(columns, axis=1)


def sums(work, side, shift, span, query):
    """S and z (H, spans, ...) of each span of a side."""
    H, _, _, r, e = work.shape
    spans = -(-side[0].shape[1] // span)
    S = gpu.empty(work.xp, work.v, (H, spans, r, e), work.kind)
    z = gpu.empty(work.xp, work.v, (H, spans, r), work.kind)
    kernel = make_sums(work.kind, work.of, query, work.sizes)
    grid = H * spans * tiles_of_sums(work)
    gpu.launch(kernel, grid, (work.sizes.side,) * 2, (side, shift, span), (S, z))
    return S, z


def tiles_of_sums(work):
    *_, r, e = work.shape
    return -(-r // work.sizes.rows) * max(1, -(-e // work.sizes.columns))


def summed(work, side, start, shift, query):
    """S and z (H, ...) of a whole side, and what was before it."""
    n, depth = side[0].shape[1], work.sizes.depth
    cuts = max(1, BLOCKS // max(1, len(work.heads) * tiles_of_sums(work)))
    span = max(2 * work.sizes.span, -(-n // (cuts * depth)) * depth)
    if work.of >= POSITIVE:
        H, _, r = shift.shape
        shift = work.xp.broadcast_to(shift, (H, -(-n // span), r))
        shift = gpu.contiguous(work.xp, shift)
    parts = sums(work, side, shift, span, query)
    return tuple(work.xp.sum(x, axis=1) + first for x, first in zip(parts, start, strict=True))


def scanned(work, own, start, decay, reverse):
    """From S and z of each span to those before, or after, it; and those of all."""
    last = tuple(work.xp.asarray(x, copy=True) for x in start)
    S, _ = own
    total = S.shape[0] * S.shape[2] * (S.shape[3] + 1)
    kernel = make_scan(work.kind, work.of >= POSITIVE, reverse)
    gpu.launch(kernel, -(-total // 256), 256, (decay,), (*own, *last))
    return own, last


def read(work, sides, state, causal, normalize, shifts, query):
    """y of every row, and den."""
    H, *_, e = work.shape
    n = sides[0][0].shape[1]
    y = gpu.empty(work.xp, work.v, (H, n, e), work.kind)
    den = gpu.empty(work.xp, work.v, (H, n if normalize else 1), work.kind)
    kernel = make_read(work.kind, work.of, query, causal, normalize, work.sizes)
    run(work, kernel, sides, state, causal, shifts, query, e, (y, den))
    return y, den


def pull(work, sides, state, causal, shifts, query):
    """The gradient of what the rows' features are made of."""
    H, _, _, r, _ = work.shape
    dx = gpu.empty(work.xp, work.v, (H, sides[0][0].shape[1], r), work.kind)
    kernel = make_pull(work.kind, work.of, query, causal, work.sizes)
    run(work, kernel, sides, state, causal, shifts, query, r, (dx,))
    return dx


def run(work, kernel, sides, state, causal, shifts, query, width, out):
    """One block for each tile of rows and columns of each span. A key's sums from later spans are
    under its own span's shift, a query's state under that before its span."""
    H, n = len(work.heads), sides[0][0].shape[1]
    span = work.sizes.span if causal else n
    base = shifts.base if query and causal else shifts.tops
    tiles = math.prod((-(-n // span), -(-span // work.sizes.rows), -(-width // work.sizes.columns)))
    inputs = (*sides, state, base, shifts.tops, shifts.careful, span)
    gpu.launch(kernel, H * tiles, (work.sizes.side,) * 2, inputs, out)
