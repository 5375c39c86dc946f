"""Attention over features, compiled: the kernels in turn, and the sums of segments put together."""

from typing import NamedTuple

import numpy as np

from refattn.kernels import all_finite, in_parallel, ready, running
from refattn.linear.maps import Plain
from refattn.linear.tiles import BLOCK, CHUNK, State, gather, read, walk
from refattn.linear.tiles_backward import gathered_vjp, read_vjp, walk_back, walk_vjp
from refattn.performer.exponentials import Exponentials

TASKS = 16  # that all heads together are cut into, so that cores find work
CAUSAL_TASKS = 8  # fewer: each cut makes a causal form sum its keys twice


class Inputs(NamedTuple):
    """q, k, v and seen with one leading axis, which of each belongs to which head, and the map."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    seen: np.ndarray
    heads: np.ndarray
    maps: Plain | Exponentials


def nothing(inputs):
    """No positions, no columns or no heads."""
    return 0 in (inputs.q.size, inputs.k.size, inputs.v.size, len(inputs.heads))


def attend(inputs, start, causal, normalize):
    """y (H, n, e), whether it is finite, and S and z (H, ...) after all keys; ``start`` is a state
    (H, ...)."""
    q, k, v, seen, heads, maps = inputs
    y = np.empty((len(heads), q.shape[1], v.shape[2]), v.dtype)
    with running(), np.errstate(invalid="ignore", over="ignore"):
        if causal:
            cuts = segments(k.shape[1], len(heads), CAUSAL_TASKS)
            states, _ = states_before(inputs, cuts, start)
            finite = np.ones(tasks_of(heads, cuts), np.bool_)
            rows = q, k, v, seen, heads, maps, cuts
            in_parallel(walk, finite.size, *rows, states, normalize, y, finite)
            after = State(*(part[:, -1] for part in states))
        else:
            _, after = states_before(inputs, segments(k.shape[1], len(heads)), start, last=True)
            cuts = segments(q.shape[1], len(heads))
            finite = np.ones(tasks_of(heads, cuts), np.bool_)
            in_parallel(read, finite.size, q, heads, maps, cuts, after, normalize, y, finite)
    return y, bool(finite.all()), after.S, after.z


def attend_vjp(dy, inputs, start, causal, normalize, dstate):
    """(dq, dk, dv) (H, ...), the gradient of ``start``, (S, z), and whether all is finite.

    ``dstate`` is the gradient of the S and z that came last.
    """
    dq, dk, dv = (
        np.empty((len(inputs.heads), *x.shape[1:]), x.dtype) for x in (inputs.q, inputs.k, inputs.v)
    )
    run = _causal_vjp if causal else _full_vjp
    with running(), np.errstate(invalid="ignore", over="ignore"):
        R, u = run(ready(dy), inputs, start, normalize, dstate, (dq, dk, dv))
    return (dq, dk, dv), (R, u), all_finite(dq, dk, dv, R, u)


def _full_vjp(dy, inputs, start, normalize, dstate, out):
    q, k, v, seen, heads, maps = inputs
    _, after = states_before(inputs, segments(k.shape[1], len(heads)), start, last=True)
    cuts = segments(q.shape[1], len(heads))
    R, u = (np.zeros((len(heads), len(cuts) - 1, *x.shape[1:]), x.dtype) for x in dstate)
    rest = heads, maps, cuts, after, normalize, (out[0], R, u)
    in_parallel(read_vjp, tasks_of(heads, cuts), dy, q, *rest)
    R, u = (sum(np.moveaxis(own, 1, 0), x) for own, x in zip((R, u), dstate, strict=True))
    cuts = segments(k.shape[1], len(heads))
    rest = heads, maps, cuts, after.top, (ready(R), ready(u)), out[1:]
    in_parallel(gathered_vjp, tasks_of(heads, cuts), k, v, seen, *rest)
    return R, u


def _causal_vjp(dy, inputs, start, normalize, dstate, out):
    q, k, v, seen, heads, maps = inputs
    cuts = segments(k.shape[1], len(heads), CAUSAL_TASKS)
    states, _ = states_before(inputs, cuts, start)
    base, rows = states.top.copy(), (q, k, v, seen)
    R, u = np.zeros_like(states.S), np.zeros_like(states.z)
    pulls = np.empty((len(heads), 2, q.shape[1]), q.dtype)
    shifts = maps.r if isinstance(maps, Exponentials) else 0
    tops = np.empty((len(heads), -(-q.shape[1] // CHUNK), shifts), q.dtype)
    rest = heads, maps, cuts, states, normalize, (out[0], pulls, tops, R, u)
    in_parallel(walk_vjp, tasks_of(heads, cuts), dy, rows, *rest)
    later, shift = dstate, np.full_like(base[:, 0], -np.inf)
    for s in range(len(cuts) - 2, -1, -1):
        own, before = (R[:, s].copy(), u[:, s].copy()), base[:, s].copy()
        R[:, s], u[:, s], base[:, s] = *later, shift
        if s > 0:  # of a segment and all after it, under the shift before it
            factor = np.exp2(np.where(shift > -np.inf, before - shift, 0))
            later = own[0] + factor[..., None] * later[0], own[1] + factor * later[1]
            shift = before
    rest = heads, maps, cuts, (pulls, tops), (R, u, base), out[1:]
    in_parallel(walk_back, tasks_of(heads, cuts), dy, rows, *rest)
    return R[:, 0], u[:, 0]


def segments(n, H, tasks=TASKS):
    """The ends of the segments that n positions of each of H heads are cut into."""
    size = max(n * H / tasks, 512)
    count = max(1, round(n / size)) if tasks > H else 1
    return np.minimum(np.arange(count + 1) * BLOCK * -(-n // (BLOCK * count)), n)


def tasks_of(heads, cuts):
    """Each segment of each head."""
    return len(heads) * (len(cuts) - 1)


def start_state(maps, lead, shape, dtype):
    """No keys yet, with S of this shape and these leading axes."""
    top = -np.inf if isinstance(maps, Exponentials) else 0.0
    S, z = np.zeros((*lead, *shape), dtype), np.zeros((*lead, shape[0]), dtype)
    return State(S, z, np.full(z.shape, top, dtype))


def states_before(inputs, cuts, start, last=False):
    """States (H, segments, ...) before each segment of the keys; with ``last``, that after all."""
    _, k, v, seen, heads, maps = inputs
    count = len(cuts) - 1
    states = start_state(maps, (len(heads), count), start.S.shape[1:], v.dtype)
    if last or count > 1:
        in_parallel(gather, tasks_of(heads, cuts), k, v, seen, heads, maps, cuts, states)
    now = start
    for s in range(count):
        own = State(*(part[:, s].copy() for part in states))
        for part, x in zip(states, now, strict=True):
            part[:, s] = x
        if last or s < count - 1:
            now = joined(now, own)
    return states, now


def joined(one, two):
    """The state of the keys of both, under the higher shift of each feature."""
    top = np.maximum(one.top, two.top)
    a, b = (np.exp2(x.top - np.where(top > -np.inf, top, 0)) for x in (one, two))
    S = a[..., None] * one.S + b[..., None] * two.S
    return State(S, a * one.z + b * two.z, top)
