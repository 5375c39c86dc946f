"""Attention over features by blocks of positions, compiled: linear attention and Performer.

S = sum phi_k v^T (r, e) and z = sum phi_k (r) go from block to block; features are made where they
are used (``refattn.linear.maps``). S and z stand under a shift of exponents, ``top`` (r), where
features are exponentials; else that is 0.

A head's positions are cut into segments that do not depend on the number of threads, and each sum
is made in one order: the same bits for any number of threads.
"""

from typing import NamedTuple

import numpy as np

from refattn.kernels import compiled
from refattn.linear.groups import WIDTH, add_product, fill, group, put
from refattn.linear.maps import apply, by_map, key_features, query_features

BLOCK = 64  # positions: a block's features stay in the cache, and its products need no packing
CHUNK = 32  # of a causal form, which has work for each pair of positions in a chunk


class State(NamedTuple):
    """Of one head, (r, e), (r), (r); of all, with leading axes H and segments."""

    S: np.ndarray
    z: np.ndarray
    top: np.ndarray


class Room(NamedTuple):
    """What one thread works in."""

    phi_k: np.ndarray
    plain: np.ndarray  # features of queries before they are turned round
    A: np.ndarray  # weights and features of queries, see ``inside``
    V: np.ndarray  # values and S
    weights: np.ndarray  # ones and z
    part: np.ndarray  # a product, before it is added
    marks: tuple  # four numbers a feature, of a block of keys
    line: np.ndarray  # a number a position


@compiled
def gather(first, last, k, v, seen, heads, maps, cuts, out):
    """S, z and top of each segment of the keys, added to ``out``.

    k (., m, d), v (., m, e), seen (., m or 0): row h of ``heads`` says which of q, k, v and seen
    belongs to head h. Segment s is positions ``cuts[s]`` to ``cuts[s + 1]``.
    """
    room, segments = room_for(maps, k, v), len(cuts) - 1
    any_spread = k.dtype.type(np.inf)
    for task in range(first, last):
        h, s = task // segments, task % segments
        keys, values, shown = k[heads[h, 1]], v[heads[h, 2]], seen[heads[h, 3]]
        state = State(out.S[h, s], out.z[h, s], out.top[h, s])
        for j in range(cuts[s], cuts[s + 1], BLOCK):
            end = min(j + BLOCK, cuts[s + 1])
            key_features(maps, keys[j:end], shown[j:end], any_spread, state.top, room)
            rescale(room.marks[0], state)
            block = values[j:end]
            if seen.size > 0:
                block = room.V[: end - j]
                show(values[j:end], shown[j:end], block)
            advance(block, maps, room, state)


@compiled
def read(first, last, q, heads, maps, cuts, state, normalize, y, finite):
    """y (H, n, e) of every query over the whole of ``state`` (H, ...) is written, and of each
    segment of queries whether it came out finite."""
    room, segments = room_for(maps, q, y), len(cuts) - 1
    for task in range(first, last):
        h, s = task // segments, task % segments
        queries = q[heads[h, 0]]
        past = past_of(State(state.S[h], state.z[h], state.top[h]), room)
        for i in range(cuts[s], cuts[s + 1], BLOCK):
            num = y[h, i : min(i + BLOCK, cuts[s + 1])]
            x = queries[i : i + len(num)]
            finite[task] &= read_block(maps, x, past, room, num, normalize)


@compiled
def read_exponentials(maps, x, past, room, num, normalize):
    phi_q = room.A[: maps.r * len(num)].reshape((maps.r, len(num)))
    query_features(maps, x, past.top, phi_q, room)
    numerators(phi_q, maps.r, room, num)
    return divide(num, room.line, normalize)


@compiled
def read_plain(maps, x, past, room, num, normalize):
    """As ``read_exponentials``, without turning the features round."""
    rows = len(num)
    den, add = room.line[:rows], room.part[:rows]
    fill(den, 0)
    for r0 in range(0, maps.r, WIDTH):
        phi_q = group(room.plain, maps.r, r0, rows)
        apply(x, r0, maps.kind, phi_q)
        add_product(phi_q, past.S[r0 : r0 + WIDTH], room.part, num, r0 > 0)
        np.dot(phi_q, past.z[r0 : r0 + WIDTH], add)
        for a in range(rows):
            den[a] += add[a]
    return divide(num, den, normalize)


read_block = by_map(read_plain, read_exponentials)


@compiled
def walk(first, last, q, k, v, seen, heads, maps, cuts, states, normalize, y, finite):
    """Causal: y (H, n, e) is written, and for each segment whether it came out finite.

    ``states`` (H, segments, ...) holds those before each segment, and at the end those after it.
    """
    room, segments = room_for(maps, k, v), len(cuts) - 1
    for task in range(first, last):
        h, s = task // segments, task % segments
        at = heads[h]
        rows = q[at[0]], k[at[1]], v[at[2]], seen[at[3]]
        state = State(states.S[h, s], states.z[h, s], states.top[h, s])
        past = past_of(state, room)
        for start in range(cuts[s], cuts[s + 1], CHUNK):
            stop, i = min(start + CHUNK, cuts[s + 1]), start
            while i < stop:  # once, unless exponents rise so fast that the chunk is cut
                A = inside(rows, i, stop, maps, past, room)
                num = y[h, i : i + A.shape[1]]
                numerators(A, maps.r, room, num)
                finite[task] &= divide(num, room.line, normalize)
                advance(room.V[BLOCK - len(num) : BLOCK], maps, room, past)
                i += len(num)
        put_state(past, state)


@compiled
def past_of(state, room):
    """A copy of the state in the last rows of ``room.V`` and ``room.weights``; see ``inside``."""
    past = State(room.V[BLOCK:], room.weights[BLOCK:], state.top)
    put_state(state, past)
    return past


@compiled
def put_state(state, out):
    put(state.z, out.z)
    for c in range(state.S.shape[0]):
        put(state.S[c], out.S[c])


@compiled
def inside(rows, i, stop, maps, past, room):
    """The weights of the block from i on, transposed: [tril(phi_q phi_k^T), phi_q]^T.

    The state is r keys more: of weight phi_q, with values S, and each with z keys' share in the
    denominator. Their values and shares, [v; S] and [1; z], are in the last rows of ``room.V`` and
    ``room.weights``, so that numerators are one product.
    """
    q, k, v, seen = rows
    count = key_features(maps, k[i:stop], seen[i:stop], spread_of(k), past.top, room)
    end = i + count
    rescale(room.marks[0], past)
    show(v[i:end], seen[i:end], room.V[BLOCK - count : BLOCK])
    A = room.A[: (count + maps.r) * count].reshape((count + maps.r, count))
    inner, phi_q = A[:count], A[count:]
    query_features(maps, q[i:end], past.top, phi_q, room)
    inner_weights(phi_q, maps.r, room, inner)
    return A


@compiled
def inner_weights(phi_q, r, room, inner):
    """tril(phi_q phi_k^T)^T: keys down, queries across."""
    for r0 in range(0, r, WIDTH):
        g, f = group(room.phi_k, r, r0, len(inner)), phi_q[r0 : r0 + WIDTH]
        add_product(g, f, room.part, inner, r0 > 0)
    hide_later(inner)


@compiled
def hide_later(A):
    """0 where the key, down, is later than the query, across."""
    for b in range(A.shape[0]):
        row = A[b]
        for a in range(A.shape[1]):
            row[a] = row[a] if a >= b else row.dtype.type(0)


@compiled
def numerators(A, r, room, num):
    """num = A^T [v; S], and den = A^T [1; z] in ``room.line``."""
    keys, rows = A.shape
    V, weights = room.V[BLOCK + r - keys :], room.weights[BLOCK + r - keys :]
    step = keys - r + WIDTH  # the block's keys and some features; the rest by groups
    np.dot(A[:step].T, V[:step], num)
    for r0 in range(step, keys, WIDTH):
        add_product(A[r0 : r0 + WIDTH].T, V[r0 : r0 + WIDTH], room.part, num, True)
    np.dot(weights, A, room.line[:rows])


@compiled
def spread_of(x):
    """How far apart, in powers of two, the shifts of one block may be: the least exponent of exp2
    is far below, so what is lost is that far below a row's largest term."""
    return x.dtype.type(400 if x.itemsize == 8 else 50)


@compiled
def room_for(maps, x, v):
    kind, r, d, e = x.dtype, maps.r, x.shape[2], v.shape[2]
    marks = np.ones(r, kind), np.empty(r, kind), np.empty(r, kind), np.empty(r, kind)
    return Room(
        np.empty(BLOCK * r, kind),
        np.empty(BLOCK * r, kind),
        np.empty((BLOCK + r) * BLOCK, kind),
        np.empty((BLOCK + r, e), kind),
        np.ones(BLOCK + r, kind),
        np.empty(max(BLOCK, WIDTH) * max(d, e, BLOCK), kind),
        marks,
        np.empty(BLOCK, kind),
    )


@compiled
def show(v, seen, out):
    """v with zeros for hidden rows, whose NaN would come through a weight of 0."""
    for b in range(v.shape[0]):
        hidden = seen.size > 0 and not seen[b]
        row, into = v[b], out[b]
        for c in range(v.shape[1]):
            into[c] = row.dtype.type(0) if hidden else row[c]


@compiled
def rescale(shrink, state):
    """S and z under a new shift."""
    for c in range(shrink.shape[0]):
        if shrink[c] != 1:
            state.z[c] *= shrink[c]
            row = state.S[c]
            for a in range(row.shape[0]):
                row[a] *= shrink[c]


@compiled
def advance(values, maps, room, state):
    """S += phi_k^T v, z += the sum of phi_k."""
    for r0 in range(0, maps.r, WIDTH):
        g = group(room.phi_k, maps.r, r0, values.shape[0])
        add_product(g.T, values, room.part, state.S[r0 : r0 + WIDTH], True)
    for c in range(maps.r):
        state.z[c] += room.marks[1][c]


@compiled
def divide(num, den, normalize):
    """num / den in place, 0 where den is 0; whether all is finite."""
    finite = 0
    for a in range(num.shape[0]):
        row = num[a]
        if normalize:
            share = row.dtype.type(1) / den[a] if den[a] != 0 else row.dtype.type(0)
            for c in range(row.shape[0]):
                row[c] *= share
        for c in range(row.shape[0]):
            finite += row[c] - row[c] == 0  # NaN for a NaN or an infinite number
    return finite == num.size
