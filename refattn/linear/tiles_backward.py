"""The gradient of ``refattn.linear.tiles``, compiled: features and weights are computed again.

Once over the queries for dq, once over the keys for dk and dv. R = sum phi_q dnum^T (r, e) and
u = sum phi_q dden (r) carry what queries send to keys: all queries in the full form; in the causal
form those from a key on, so that its second pass runs backwards, and no state is kept.
"""

from typing import NamedTuple

import numpy as np

from refattn.kernels import compiled
from refattn.linear.groups import WIDTH, add_product, fill, group, put
from refattn.linear.maps import key_features, key_vjp, query_features, query_vjp
from refattn.linear.tiles import (
    BLOCK,
    CHUNK,
    State,
    advance,
    hide_later,
    inner_weights,
    inside,
    numerators,
    past_of,
    room_for,
    show,
    spread_of,
)
from refattn.scalars import exp2


class Back(NamedTuple):
    """What one thread works in, beside ``Room``."""

    num: np.ndarray
    dnum: np.ndarray
    dden: np.ndarray
    share: np.ndarray  # 1 / den
    dA: np.ndarray
    dphi: np.ndarray
    sums: np.ndarray
    tops: np.ndarray  # the shift before each part of a chunk that is cut


@compiled
def back_for(maps, v):
    kind, r, e = v.dtype, maps.r, v.shape[2]
    return Back(
        np.empty((BLOCK, e), kind),
        np.empty((BLOCK, e), kind),
        np.empty(BLOCK, kind),
        np.empty(BLOCK, kind),
        np.empty((BLOCK + r) * BLOCK, kind),
        np.empty(BLOCK * r, kind),
        np.empty(r, kind),
        np.empty((CHUNK, r), kind),
    )


@compiled
def read_vjp(first, last, dy, q, heads, maps, cuts, state, normalize, out):
    """``out`` = (dq (H, n, d), R, u (H, segments, ...)), R and u of each segment of queries."""
    dq, R, u = out
    room, back, segments = room_for(maps, q, dy), back_for(maps, dy), len(cuts) - 1
    for task in range(first, last):
        h, s = task // segments, task % segments
        queries = q[heads[h, 0]]
        past = past_of(State(state.S[h], state.z[h], state.top[h]), room)
        for i in range(cuts[s], cuts[s + 1], BLOCK):
            end = min(i + BLOCK, cuts[s + 1])
            x, rows = queries[i:end], end - i
            phi_q = room.A[: maps.r * rows].reshape((maps.r, rows))
            query_features(maps, x, past.top, phi_q, room)
            dA = outputs_vjp(dy[h, i:end], phi_q, maps.r, room, back, normalize)
            send(phi_q, back, room, R[h, s], u[h, s])
            query_vjp(maps, dA, phi_q, x, room.part, dq[h, i:end])


@compiled
def outputs_vjp(dy, A, r, room, back, normalize):
    """dA, for the weights A; dnum, dden and 1 / den are left in ``back``."""
    keys, rows = A.shape
    V, weights = room.V[BLOCK + r - keys :], room.weights[BLOCK + r - keys :]
    num, dnum = back.num[:rows], back.dnum[:rows]
    numerators(A, r, room, num)
    one, zero = num.dtype.type(1), num.dtype.type(0)
    for a in range(rows):
        den = room.line[a] if normalize else one
        back.share[a], pull = one / den if den != 0 else zero, zero
        for c in range(dy.shape[1]):
            # y - v is small where few keys count: y by a division, for its last bit
            y = num[a, c] / den if den != 0 else zero
            dnum[a, c] = dy[a, c] * back.share[a]
            pull += dnum[a, c] * y
        back.dden[a] = -pull if normalize else zero
    # num = A^T [v; S], den = A^T [1; z]
    dA = back.dA[: A.size].reshape(A.shape)
    pull_weights(V, weights, dnum, back.dden, dA)
    return dA


@compiled
def pull_weights(V, weights, dnum, dden, dA):
    """dA = V dnum^T + weights dden^T."""
    for r0 in range(0, dA.shape[0], WIDTH):
        np.dot(V[r0 : r0 + WIDTH], dnum.T, dA[r0 : r0 + WIDTH])
    for b in range(dA.shape[0]):
        row, weight = dA[b], weights[b]
        for a in range(dA.shape[1]):
            row[a] += weight * dden[a]


@compiled
def send(phi_q, back, room, R, u):
    """R += phi_q dnum, u += phi_q dden."""
    r, rows = phi_q.shape
    for r0 in range(0, r, WIDTH):
        add_product(phi_q[r0 : r0 + WIDTH], back.dnum[:rows], room.part, R[r0 : r0 + WIDTH], True)
    np.dot(phi_q, back.dden[:rows], back.sums)
    for c in range(r):
        u[c] += back.sums[c]


@compiled
def gathered_vjp(first, last, k, v, seen, heads, maps, cuts, top, back_state, out):
    """``out`` = (dk, dv) (H, m, ...) of every key, from R and u (H, ...) of all queries."""
    dk, dv = out
    room, back, segments = room_for(maps, k, v), back_for(maps, v), len(cuts) - 1
    any_spread, own = k.dtype.type(np.inf), np.empty_like(top[0])
    for task in range(first, last):
        h, s = task // segments, task % segments
        keys, values, shown = k[heads[h, 1]], v[heads[h, 2]], seen[heads[h, 3]]
        R, u = back_state[0][h], back_state[1][h]
        put(top[h], own)
        for j in range(cuts[s], cuts[s + 1], BLOCK):
            end = min(j + BLOCK, cuts[s + 1])
            x, block = keys[j:end], room.V[: end - j]
            key_features(maps, x, shown[j:end], any_spread, own, room)
            show(values[j:end], shown[j:end], block)
            sent(block, maps, R, u, room, back, dv[h, j:end])
            key_vjp(maps, back.dphi, room.phi_k, x, room.part, dk[h, j:end])
            clear_hidden(shown[j:end], dk[h, j:end], dv[h, j:end])


@compiled
def sent(values, maps, R, u, room, back, dv):
    """dv = phi_k R, dphi_k = v R^T + u: what queries beyond the block send to its keys."""
    for r0 in range(0, maps.r, WIDTH):
        g, dg = group(room.phi_k, maps.r, r0, len(dv)), group(back.dphi, maps.r, r0, len(dv))
        part = R[r0 : r0 + WIDTH]
        add_product(g, part, room.part, dv, r0 > 0)
        np.dot(values, part.T, dg)
        for b in range(dg.shape[0]):
            row = dg[b]
            for c in range(dg.shape[1]):
                row[c] += u[r0 + c]


@compiled
def clear_hidden(seen, dk, dv):
    if seen.size > 0:
        for b in range(len(seen)):
            if not seen[b]:
                fill(dk[b], 0)
                fill(dv[b], 0)


@compiled
def walk_vjp(first, last, dy, rows, heads, maps, cuts, states, normalize, out):
    """Causal, once forward: ``out`` = (dq (H, n, d), pulls (H, 2, n), tops (H, chunks, r), R, u
    (H, segments, ...)) is written.

    pulls are 1 / den and dden, tops the shift before each chunk; R and u those of each segment but
    the first, under the shift before the segment. ``states`` as ``walk`` takes them.
    """
    q, k, v, seen = rows
    dq, pulls, tops, R, u = out
    room, back, base = room_for(maps, k, v), back_for(maps, v), np.empty_like(states.top[0, 0])
    segments = len(cuts) - 1
    for task in range(first, last):
        h, s = task // segments, task % segments
        at = heads[h]
        own = q[at[0]], k[at[1]], v[at[2]], seen[at[3]]
        past = past_of(State(states.S[h, s], states.z[h, s], states.top[h, s]), room)
        put(past.top, base)
        for start in range(cuts[s], cuts[s + 1], CHUNK):
            stop, i = min(start + CHUNK, cuts[s + 1]), start
            put(past.top[: tops.shape[2]], tops[h, start // CHUNK])
            while i < stop:
                A = inside(own, i, stop, maps, past, room)
                count = A.shape[1]
                end = i + count
                dA = outputs_vjp(dy[h, i:end], A, maps.r, room, back, normalize)
                put(back.share[:count], pulls[h, 0, i:end])
                put(back.dden[:count], pulls[h, 1, i:end])
                phi_q, dphi = A[count:], dA[count:]
                pull_inner(dA[:count], maps, room, dphi)
                query_vjp(maps, dphi, phi_q, own[0][i:end], room.part, dq[h, i:end])
                if s > 0:
                    lower(phi_q, base, past.top)
                    send(phi_q, back, room, R[h, s], u[h, s])
                advance(room.V[BLOCK - count : BLOCK], maps, room, past)
                i = end


@compiled
def pull_inner(inner, maps, room, dphi):
    """dphi_q += phi_k^T inner: what comes through the weights of the block's keys."""
    hide_later(inner)
    for r0 in range(0, maps.r, WIDTH):
        g = group(room.phi_k, maps.r, r0, len(inner))
        add_product(g.T, inner, room.part, dphi[r0 : r0 + WIDTH], True)


@compiled
def lower(phi_q, base, top):
    """phi_q under the shift ``base`` instead of ``top``, which is not below it."""
    for c in range(len(base)):
        factor = exp2(base[c] - top[c]) if base[c] > -np.inf else phi_q.dtype.type(0)
        for a in range(phi_q.shape[1]):
            phi_q[c, a] *= factor


@compiled
def walk_back(first, last, dy, rows, heads, maps, cuts, kept, sums, out):
    """Causal, once backward: ``out`` = (dk, dv) (H, n, ...) is written.

    ``kept`` = (pulls, tops) of ``walk_vjp``. ``sums`` = (R, u, base) (H, segments, ...): R and u of
    all after each segment, under the shift ``base``; at the end they have the segment's own too.
    """
    q, k, v, seen = rows
    pulls, tops = kept
    R, u, base = sums
    dk, dv = out
    room, back = room_for(maps, k, v), back_for(maps, v)
    top, starts = np.zeros(maps.r, k.dtype), np.empty(CHUNK + 1, np.int64)
    segments = len(cuts) - 1
    for task in range(first, last):
        h, s = task // segments, task % segments
        at = heads[h]
        own = q[at[0]], k[at[1]], v[at[2]], seen[at[3]]
        later = R[h, s], u[h, s], base[h, s]
        for chunk in range((cuts[s + 1] - cuts[s] + CHUNK - 1) // CHUNK - 1, -1, -1):
            start = cuts[s] + chunk * CHUNK
            stop, parts, i = min(start + CHUNK, cuts[s + 1]), 0, start
            put(tops[h, start // CHUNK], top)
            while i < stop:  # where the chunk was cut on the way forward
                starts[parts], starts[parts + 1] = i, stop
                put(top, back.tops[parts])
                i += key_features(maps, own[1][i:stop], own[3][i:stop], spread_of(k), top, room)
                parts += 1
            for part in range(parts - 1, -1, -1):
                i, end = starts[part], starts[part + 1]
                if parts > 1:
                    put(back.tops[part], top)
                    key_features(maps, own[1][i:end], own[3][i:end], spread_of(k), top, room)
                block_back(dy[h], own, i, end, maps, top, later, pulls[h], (room, back),
                           (dk[h], dv[h]))  # fmt: skip


@compiled
def block_back(dy, rows, i, end, maps, top, sums, pulls, work, out):
    """Keys i to end against the queries among them and all later ones, whose R and u come in."""
    q, k, v, seen = rows
    R, u, base = sums
    room, back = work
    dk, dv = out[0][i:end], out[1][i:end]
    count = end - i
    raise_sums(top, base, R, u)
    values, dnum = room.V[:count], back.dnum[:count]
    show(v[i:end], seen[i:end], values)
    inner, dA = room.A[: count * count], back.dA[: count * count].reshape((count, count))
    inner = inner.reshape((count, count))
    phi_q = room.A[count * count : (count + maps.r) * count].reshape((maps.r, count))
    query_features(maps, q[i:end], top, phi_q, room)
    inner_weights(phi_q, maps.r, room, inner)
    for a in range(count):
        back.dden[a] = pulls[1, i + a]
        for c in range(dy.shape[1]):
            dnum[a, c] = dy[i + a, c] * pulls[0, i + a]
    sent(values, maps, R, u, room, back, dv)
    # num = tril(phi_q @ phi_k.T) @ v
    add_product(inner, dnum, room.part, dv, True)
    pull_weights(values, room.weights, dnum, back.dden, dA)
    hide_later(dA)
    for r0 in range(0, maps.r, WIDTH):
        dphi = group(back.dphi, maps.r, r0, count)
        add_product(dA, phi_q[r0 : r0 + WIDTH].T, room.part, dphi, True)
    key_vjp(maps, back.dphi, room.phi_k, k[i:end], room.part, dk)
    clear_hidden(seen[i:end], dk, dv)
    send(phi_q, back, room, R, u)


@compiled
def raise_sums(top, base, R, u):
    """R and u of later queries under the shift ``top`` instead of ``base``, which is not below."""
    for c in range(len(top)):
        if base[c] > -np.inf and base[c] != top[c]:
            factor = exp2(top[c] - base[c])
            u[c] *= factor
            for a in range(R.shape[1]):
                R[c, a] *= factor
        base[c] = top[c]
