"""Performer on CUDA: arguments as in ``formula``, the kernels those of linear attention.

Exponents and sines are made by one kernel and held, (., n, r); exponentials are taken where they
are used, under shifts that run along with the keys (``cuda_shifts``). Arrays of NumPy, or of
another library that lie on a device; omega is checked and scaled in NumPy.
"""

from typing import Any, NamedTuple

import numpy as np

from refattn import checks, gpu
from refattn.linear.cuda_inputs import by_formula, host, seen_of, weights_of
from refattn.linear.cuda_maps import POSITIVE, SIZES, TRIG
from refattn.linear.cuda_over_features import Shifts, Work, attend, attend_vjp
from refattn.performer import formula
from refattn.performer.cuda_features import make_exponents, make_rows_vjp
from refattn.performer.cuda_shifts import make_lines, make_running, make_tops
from refattn.performer.features import PARTS, directions


def performer_attention(
    q, k, v, *, omega, kind="positive", causal=False, key_mask=None, scale=None
):
    """``refattn.performer_attention``, tile by tile."""
    found = _given(q, k, v, omega, kind, causal, key_mask, scale)
    xp, lead = found.xp, found.lead
    if _nothing(found):
        options = {"omega": host(omega), "kind": kind, "causal": causal, "key_mask": key_mask}
        y = by_formula(found, formula.performer_attention, **options, scale=scale)
        return gpu.cast(xp, y, found.dtype)
    work, shifts, _ = _work(found, causal)
    y, *_ = attend(work, _no_state(work), causal, True, shifts)
    return gpu.cast(xp, xp.reshape(y, (*lead, *y.shape[1:])), found.dtype)


def performer_attention_vjp(
    dy, q, k, v, *, omega, kind="positive", causal=False, key_mask=None, scale=None
):
    """``refattn.performer_attention_vjp``, features and weights computed again tile by tile."""
    found = _given(q, k, v, omega, kind, causal, key_mask, scale)
    xp, lead, n, e = found.xp, found.lead, found.q.shape[-2], found.v.shape[-1]
    up = gpu.cotangent(xp, found.q, "dy", dy, (*lead, n, e), found.dtype)
    shapes = [np.shape(gpu.outline(x)) for x in (q, k, v)]
    if _nothing(found):
        options = {"omega": host(omega), "kind": kind, "causal": causal, "key_mask": key_mask}
        grads = by_formula(found, formula.performer_attention_vjp, up, **options, scale=scale)
        return tuple(gpu.cast(xp, g, found.dtype) for g in grads)
    work, shifts, rows = _work(found, causal)
    up, start = xp.reshape(gpu.contiguous(xp, up), (-1, n, e)), _no_state(work)
    (dq, dk, dv), _ = attend_vjp(work, up, start, causal, True, start, shifts)
    dq = _rows_vjp(found, dq, work.q, rows[0], found.q.shape, 0.0)
    outer = found.scale if found.of == TRIG else -found.scale
    dk = _rows_vjp(found, dk, work.k, rows[1], found.k.shape, outer)
    dv = xp.reshape(dv, (*lead, *dv.shape[1:]))
    pairs = zip((dq, dk, dv), shapes, strict=True)
    return tuple(gpu.cast(xp, gpu.summed(xp, g, shape), found.dtype) for g, shape in pairs)


class Given(NamedTuple):
    """Checked arguments, in the dtype of the arithmetic; ``dtype`` came in. W (M, d) is
    sqrt(scale) omega, ``two`` whether a direction has two features."""

    xp: Any
    q: Any
    k: Any
    v: Any
    dtype: np.dtype
    seen: Any
    lead: tuple
    W: Any
    scale: float
    of: int
    two: bool


def _given(q, k, v, omega, kind, causal, key_mask, scale):
    xp, q, k, v, dtype = gpu.qkv(q, k, v)
    n, m, lead = q.shape[-2], k.shape[-2], checks.lead(*map(gpu.outline, (q, k, v)))
    checks.choice("kind", kind, PARTS)
    omega = directions(host(omega), q.shape[-1], dtype)
    scale = checks.scale(scale, q.shape[-1])
    if scale <= 0:
        raise ValueError(f"scale is {scale}; Performer needs scale > 0, it takes its square root")
    if checks.flag("causal", causal):
        checks.square("causal Performer", n, m)
    seen = weights_of(xp, q, seen_of(xp, q, key_mask, (*lead, m)), m)
    W = gpu.like(xp, q, np.ascontiguousarray(scale**0.5 * omega).astype(omega.dtype, copy=False))
    of = TRIG if kind == "trig" else POSITIVE
    return Given(xp, q, k, v, dtype, seen, lead, W, scale, of, kind != "positive")


def _nothing(found):
    return 0 in (*found.q.shape, *found.k.shape, *found.v.shape, *found.lead)


def _no_state(work):
    H, _, _, r, e = work.shape
    return tuple(gpu.empty(work.xp, work.q, shape, work.kind, 0) for shape in ((H, r, e), (H, r)))


def _work(found, causal):
    """What attention over features takes, the shifts of its exponents, and q and k (., n, d)."""
    xp, kind = found.xp, gpu.dtype_of(found.q).type
    flat, heads, _ = gpu.heads_of(xp, *found[1:4], found.seen)
    q, k, v, seen = flat
    half = (0.5 if found.of == TRIG else -0.5) * found.scale
    a, _ = _exponents(found, q, 0.0)
    b, line = _exponents(found, k, half)
    work = Work(xp, found.of, a, b, v, seen[:, 0], heads, SIZES[kind])
    return work, _shifts(work, line, causal), (q, k)


def _exponents(found, x, half):
    xp, kind, (count, n) = found.xp, gpu.dtype_of(x).type, x.shape[:2]
    M, sizes = len(found.W), SIZES[kind]
    made = gpu.empty(xp, x, (count, n, M * (2 if found.two else 1)), kind)
    line = gpu.empty(xp, x, (count, n if found.of == TRIG else 1), kind)
    kernel = make_exponents(kind, found.of, found.two, sizes)
    grid = count * -(-n // sizes.rows) * -(-M // sizes.columns)
    gpu.launch(kernel, grid, (sizes.side,) * 2, (x, found.W, kind(half)), (made, line))
    return made, line


def _rows_vjp(found, g, made, x, shape, outer):
    """dx (., n, d) from the gradient (H, n, r) of exponents or sines; heads that share rows are
    added first."""
    xp, kind, sizes = found.xp, gpu.dtype_of(x).type, SIZES[gpu.dtype_of(x).type]
    g = gpu.summed(xp, xp.reshape(g, (*found.lead, *g.shape[1:])), (*shape[:-1], g.shape[-1]))
    g, dx = gpu.contiguous(xp, xp.reshape(g, made.shape)), gpu.empty(xp, x, x.shape, kind)
    kernel = make_rows_vjp(kind, found.of, found.two, sizes)
    count, n, d = x.shape
    grid = count * -(-n // sizes.rows) * -(-d // sizes.columns)
    gpu.launch(kernel, grid, (sizes.side,) * 2, (g, made, x, found.W, kind(outer)), (dx,))
    return xp.reshape(dx, tuple(shape))


def _shifts(work, line, causal):
    """The shifts of keys and queries; sines have one exponent for all features of a key."""
    xp, kind, (H, n, m, r, _) = work.xp, work.kind, work.shape
    b = line[..., None] if work.of == TRIG else work.k
    span = work.sizes.span * (1 if causal else 2)
    shape = (H, -(-m // span), b.shape[2])
    tops, first = (gpu.empty(xp, b, shape, kind) for _ in range(2))
    count = H * shape[1] * shape[2]
    keys = b, work.seen, work.heads
    gpu.launch(make_tops(kind), -(-count // 128), 128, (*keys, span), (tops, first))
    careful = gpu.empty(xp, b, shape[:2], np.int32, 0)
    if causal:
        base, decay = (gpu.empty(xp, b, shape, kind) for _ in range(2))
        grid = -(-H * shape[2] // 128)
        gpu.launch(make_running(kind), grid, 128, (first,), (tops, base, decay, careful))
    else:
        tops, span = xp.max(tops, axis=1, keepdims=True), n
        base = decay = tops
    q_line, side = gpu.empty(xp, b, (H, n), kind), work.sizes.side
    kernel = make_lines(kind, work.of, causal, side)
    grid = H * -(-n // side)
    inputs = (work.q, *keys, base, tops, careful, span)
    gpu.launch(kernel, grid, (side, side), inputs, (q_line,))
    if work.of == TRIG:
        wide = (*tops.shape[:2], r)
        base, tops, decay = (
            gpu.contiguous(xp, xp.broadcast_to(x, wide)) for x in (base, tops, decay)
        )
    return Shifts(base, tops, decay, careful, q_line, line)
