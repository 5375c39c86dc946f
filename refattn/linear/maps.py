"""Feature maps of a block of rows, compiled: the features, and from their gradients to the rows'.

Features of keys are in groups of columns, those of queries transposed, as in
``refattn.linear.groups``. The type of ``maps`` says at compile time which map it is: code that held
both would take twice as long to compile.
"""

from typing import NamedTuple

import numpy as np
from numba.extending import overload

from refattn.kernels import compiled
from refattn.linear.groups import WIDTH, fill, group
from refattn.performer.exponentials import (
    Exponentials,
    key_exponentials,
    key_exponentials_vjp,
    query_exponentials,
    query_exponentials_vjp,
)
from refattn.scalars import FASTMATH, LOG2E, exp2

READY, ELU, RELU = 0, 1, 2  # features that came ready made; elu + 1; max(x, 0)
DEEP = -80.0  # below it exp(x) may be less than exp2 gives


class Plain(NamedTuple):
    """A map of single numbers."""

    kind: int
    r: int


def by_map(plain, exponential):
    """A function that is one of the two, by the type of its argument ``maps``."""

    def choose(maps, *args):
        return (exponential if isinstance(maps, Exponentials) else plain)(maps, *args)

    @overload(choose, strict=False, jit_options={"fastmath": FASTMATH, "error_model": "numpy"})
    def _(maps, *args):
        return (exponential if maps.instance_class is Exponentials else plain).py_func

    return choose


@compiled
def plain_keys(maps, x, seen, most, top, room):
    sums, rows = room.marks[1], x.shape[0]
    for r0 in range(0, maps.r, WIDTH):
        g = group(room.phi_k, maps.r, r0, rows)
        apply(x, r0, maps.kind, g)
        for b in range(seen.size):
            if not seen[b]:
                fill(g[b], 0)
        np.dot(room.weights[:rows], g, sums[r0 : r0 + g.shape[1]])  # the block's weights are 1
    return rows


@compiled
def plain_queries(maps, x, top, phi, room):
    rows = x.shape[0]
    for r0 in range(0, maps.r, WIDTH):
        g = group(room.plain, maps.r, r0, rows)
        apply(x, r0, maps.kind, g)
        for c in range(g.shape[1]):
            row = phi[r0 + c]
            for a in range(rows):
                row[a] = g[a, c]


@compiled
def apply(x, r0, kind, phi):
    """phi (rows, w) of the columns of x from r0 on. NaN stays NaN."""
    zero, one = x.dtype.type(0), x.dtype.type(1)
    deep, unit = x.dtype.type(DEEP), x.dtype.type(LOG2E)
    low = 0
    for a in range(phi.shape[0]):
        row, out = x[a, r0 : r0 + phi.shape[1]], phi[a]
        if kind == ELU:
            for c in range(out.shape[0]):
                t = row[c]
                low += t < deep
                u = exp2(zero if t > zero else t * unit)
                out[c] = t + one if t > zero else u
        elif kind == RELU:
            for c in range(out.shape[0]):
                out[c] = zero if row[c] < zero else row[c]
        else:
            for c in range(out.shape[0]):
                out[c] = row[c]
    if low > 0:
        deep_exponentials(x, r0, phi)


@compiled
def deep_exponentials(x, r0, phi):
    """exp(x) down to the least number there is, as a product: a row of such features can still
    have a quotient."""
    most = x.dtype.type(-100)
    for a in range(phi.shape[0]):
        for c in range(phi.shape[1]):
            t = x[a, r0 + c] * x.dtype.type(LOG2E)
            if t < most:
                phi[a, c] = exp2(most) * exp2(t - most)


@compiled
def plain_queries_vjp(maps, dphi, phi, x, part, dx):
    for a in range(x.shape[0]):
        for c in range(maps.r):
            dx[a, c] = dphi[c, a] * slope(x[a, c], phi[c, a], maps.kind)


@compiled
def plain_keys_vjp(maps, dphi, phi, x, part, dx):
    for r0 in range(0, maps.r, WIDTH):
        g, p = group(dphi, maps.r, r0, x.shape[0]), group(phi, maps.r, r0, x.shape[0])
        for b in range(x.shape[0]):
            row, out = x[b], dx[b]
            for c in range(g.shape[1]):
                out[r0 + c] = g[b, c] * slope(row[r0 + c], p[b, c], maps.kind)


@compiled
def slope(x, phi, kind):
    """d phi / d x."""
    one, zero = type(x)(1), type(x)(0)
    if kind == ELU:
        return one if x > zero else phi
    return one if kind == READY or x > zero else zero


# (maps, x, seen, most, top, room) -> how many keys of x, from the first on, were taken together:
# all, but for exponentials. Their features are in ``room.phi_k``, the sums in ``room.marks``.
key_features = by_map(plain_keys, key_exponentials)
# (maps, x, top, phi, room): phi (r, rows) gets the features of queries, transposed.
query_features = by_map(plain_queries, query_exponentials)
# (maps, dphi, phi, x, part, dx): from dphi, which may be written to, to dx.
key_vjp = by_map(plain_keys_vjp, key_exponentials_vjp)
query_vjp = by_map(plain_queries_vjp, query_exponentials_vjp)
