"""Softmax attention on the CPU: arguments as in ``formula``, tiles by ``tiles``."""

import numpy as np

from refattn import checks
from refattn.arrays import gradients
from refattn.dispatch import rows_of
from refattn.kernels import all_finite, heads_of, in_parallel, joined, running, spread
from refattn.scalars import LOG2E
from refattn.softmax import formula
from refattn.softmax.tiles import attend
from refattn.softmax.tiles_backward import attend_vjp

# Queries across and keys down in a tile: scores, packed queries and the output's part stay near the
# first-level cache. Narrow ones where spans are short and move: less of a tile is out of some span.
WIDE, NARROW = (64, 128), (32, 96)
PARTS = 8  # of the keys of all heads together in a backward pass, so that cores find work


def softmax_attention(
    q,
    k,
    v,
    *,
    mask=None,
    bias=None,
    causal=False,
    scale=None,
    softcap=None,
    return_lse=False,
):
    """``refattn.softmax_attention``, tile by tile: no n x m array is made."""
    checks.flag("return_lse", return_lse)
    q, k, v, dtype = checks.qkv(q, k, v)
    spans = spans_of(q.shape[-2], k.shape[-2], causal)
    pairs = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap}
    y, lse = over_spans(q, k, v, spans, dtype=dtype, **pairs)
    y = y.astype(dtype, copy=False)
    return (y, lse) if return_lse else y


def softmax_attention_vjp(
    dy,
    q,
    k,
    v,
    *,
    mask=None,
    bias=None,
    causal=False,
    scale=None,
    softcap=None,
    return_lse=False,
    dlse=None,
    saved=None,
):
    """``refattn.softmax_attention_vjp``, the weights computed again tile by tile."""
    checks.flag("return_lse", return_lse)
    q, k, v, dtype = checks.qkv(q, k, v)
    rows = (*checks.lead(q, k, v), q.shape[-2])
    dy = checks.cotangent("dy", dy, (*rows, v.shape[-1]), dtype)
    if dlse is not None:
        dlse = checks.cotangent("dlse", dlse, rows, q.dtype)
    spans = spans_of(q.shape[-2], k.shape[-2], causal)
    pairs = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap}
    saved = checks.saved(saved, (*rows, v.shape[-1]), q.dtype)
    found = over_spans_vjp(dy, q, k, v, spans, dlse=dlse, dtype=dtype, saved=saved, **pairs)
    return _handed_out(found, q, k, v, bias, dtype)


def _handed_out(found, q, k, v, bias, dtype):
    """dq, dk, dv and, where a bias came, dbias: in their inputs' shapes and dtype."""
    shapes = [q.shape, k.shape, v.shape, *([np.shape(bias)] if bias is not None else [])]
    return gradients(found, shapes, dtype)


def spans_of(n, m, causal=False):
    """(n, 2): the first and last + 1 key that each query may see."""
    spans = np.zeros((n, 2), np.int32)
    spans[:, 1] = m
    if checks.flag("causal", causal):
        np.clip(np.arange(m - n + 1, m + 1), 0, m, out=spans[:, 1], casting="unsafe")
    return spans


def some_rows(q, k, v, *, spans, **pairs):
    """``over_spans`` for arrays of any dtype: the attention of rows that stand where they stand."""
    q, k, v, dtype = checks.qkv(q, k, v)
    return over_spans(q, k, v, spans, dtype=dtype, **pairs)[0].astype(dtype, copy=False)


def some_rows_vjp(dy, q, k, v, *, spans, **pairs):
    """Gradient of ``some_rows``."""
    q, k, v, dtype = checks.qkv(q, k, v)
    dy = checks.cotangent("dy", dy, (*checks.lead(q, k, v), q.shape[-2], v.shape[-1]), dtype)
    found = over_spans_vjp(dy, q, k, v, spans, dtype=dtype, **pairs)
    return _handed_out(found, q, k, v, pairs.get("bias"), dtype)


@rows_of(formula.softmax_attention, backend="numba")
def _some_rows(rows, n, m, *, mask=None, bias=None, causal=False, **options):
    """Spans of the rows that are left: causal needs no mask."""
    few = {"spans": spans_of(n, m, causal)[rows]}
    for name, pairs in (("mask", mask), ("bias", bias)):
        if pairs is not None:
            checks.fits(name, np.asarray(pairs), (*np.shape(pairs)[:-2], n, m))
            # Also where all rows share one: the gradient of each open row is wanted by itself.
            pairs = _at_least_2d(np.asarray(pairs))
            whole = *pairs.shape[:-2], n, pairs.shape[-1]
            pairs = np.broadcast_to(pairs, whole)[..., rows, :]
        few[name] = pairs
    return some_rows, some_rows_vjp, {**options, **few}


def over_spans(q, k, v, spans, *, dtype, mask=None, bias=None, scale=None, softcap=None):
    """Softmax attention of query i over the keys of ``spans[i]``: y and lse, in q's dtype.

    q, k, v as ``checks.qkv`` gives them; ``dtype`` is the one that came in.
    """
    given = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap}
    arrays, heads, lead, numbers = _inputs(q, k, v, dtype, **given)
    n, m, e = q.shape[-2], k.shape[-2], v.shape[-1]
    y, lse = np.empty((len(heads), n, e), q.dtype), np.empty((len(heads), n), q.dtype)
    if 0 in (m, n, e, len(heads)):
        return _without_kernel(q, k, v, spans, given)
    short = (spans[:, 1] - spans[:, 0]).mean() <= 512 and (spans != spans[0]).any()
    tile = NARROW if short else WIDE
    with running():
        tasks = len(heads) * -(-n // tile[0])
        finite = np.ones(tasks, np.bool_)
        rest = heads, spans, *arrays[3:], numbers, tile, (y, lse, finite)
        in_parallel(attend, tasks, *arrays[:3], *rest)
    if not finite.all():  # a NaN, perhaps out of sight: 0 times NaN is NaN
        return _without_kernel(q, k, v, spans, given)
    return y.reshape(*lead, n, e), lse.reshape(*lead, n)


def over_spans_vjp(
    dy, q, k, v, spans, *, dtype, dlse=None, saved=None, mask=None, bias=None, scale=None,
    softcap=None
):  # fmt: skip
    """[dq, dk, dv] of ``over_spans``, and dbias where a bias came; leading axes not summed.

    ``saved`` is what ``over_spans`` gave, if that is still at hand.
    """
    given = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap}
    arrays, heads, lead, numbers = _inputs(q, k, v, dtype, **given)
    n, m, d, e = q.shape[-2], *k.shape[-2:], v.shape[-1]
    H = len(heads)
    if 0 in (n, m, e, H):
        return _vjp_without_kernel(dy, q, k, v, spans, dlse, given)
    y, lse = saved or over_spans(q, k, v, spans, dtype=dtype, **given)
    if bias is not None and ((lse < np.finfo(lse.dtype).min / 4) & (lse > -np.inf)).any():
        # Rows of nothing but the lowest numbers: the sum of weights is lost in lse.
        return _vjp_without_kernel(dy, q, k, v, spans, dlse, given)
    lse = np.where(lse == -np.inf, np.inf, lse * q.dtype.type(LOG2E))
    of_rows = lse, np.zeros((), q.dtype) if dlse is None else dlse
    of_rows = [spread(x.astype(q.dtype), (*lead, n)).reshape(H, n) for x in of_rows]
    dy, y = (spread(x, (*lead, n, e)).reshape(H, n, e) for x in (dy, y))
    plan = _plan(spans, m, H)
    rows = int(plan[-1, 4] + plan[-1, 3] - plan[-1, 2])
    dq, dk, dv = (np.zeros((H, *s), q.dtype) for s in ((rows, d), (m, d), (m, e)))
    ds = np.zeros((H, n, m) if bias is not None else (0, 0, 0), q.dtype)
    with running():
        pairs = (*arrays[3:], *of_rows, y)
        rest = heads, spans, pairs, numbers, plan, (dq, dk, dv, ds)
        in_parallel(attend_vjp, H * len(plan), dy, *arrays[:3], *rest)
    found = [joined(dq, plan, n), dk, dv]
    if not all_finite(*found):
        return _vjp_without_kernel(dy.reshape(*lead, n, e), q, k, v, spans, dlse, given)
    found = [g.reshape(*lead, *g.shape[1:]) for g in found]
    if bias is not None:
        found.append(ds.reshape(*lead, n, m))
    return found


def _inputs(q, k, v, dtype, mask, bias, scale, softcap):
    """q, k, v, mask and bias as the kernels take them; heads, leading shape, numbers."""
    n, m = q.shape[-2], k.shape[-2]
    shape = (*checks.lead(q, k, v), n, m)
    if mask is not None:
        checks.boolean_mask(mask, shape)
        mask = _at_least_2d(np.asarray(mask))
    if bias is not None:
        bias = checks.real_option("bias", bias, dtype, q.dtype)
        checks.fits("bias", bias, shape)
        bias = _at_least_2d(bias)
    scale = checks.scale(scale, q.shape[-1])
    cap = 0.0 if softcap is None else checks.number("softcap", softcap, positive=True)
    numbers = np.array([scale * LOG2E, cap * LOG2E, scale], q.dtype)
    there = [x for x in (mask, bias) if x is not None]
    flat, index, lead = heads_of(q, k, v, *there)
    rest, columns = iter(flat[3:]), iter(index.T[3:])
    heads = np.zeros((len(index), 5), np.int64)
    heads[:, :3] = index[:, :3]
    for place, x, kind in ((3, mask, np.bool_), (4, bias, q.dtype.type)):
        flat.append(np.zeros((0, 0, 0), kind) if x is None else next(rest))
        heads[:, place] = 0 if x is None else next(columns)
    return [*flat[:3], *flat[-2:]], heads, lead, numbers


def _at_least_2d(x):
    return x.reshape((1,) * (2 - x.ndim) + x.shape)


def _plan(spans, m, H):
    """(parts, 5) for ``attend_vjp``: keys, queries that see them, and their rows' place in dq."""
    parts = max(1, min(PARTS // H, -(-m // 64)))
    size = -(-m // parts) if parts else m
    size = -(-size // 64) * 64
    rows, place = [], 0
    for first in range(0, m, size):
        last = min(first + size, m)
        seen = np.flatnonzero((spans[:, 0] < last) & (spans[:, 1] > first))
        r0, r1 = (seen[0], seen[-1] + 1) if len(seen) else (0, 0)
        if m <= size:
            r0, r1 = 0, len(spans)
        rows.append((first, last, r0, r1, place))
        place += r1 - r0
    return np.array(rows, np.int64)


def _without_kernel(q, k, v, spans, given):
    """y and lse by the formula, some rows at a time: where NaN must not pass a mask."""
    q, k, v = _spread(q, k, v)
    parts = [
        formula.softmax_attention(q[..., rows, :], k, v, return_lse=True, **few)
        for rows, few in _row_blocks(q, k, spans, given)
    ]
    ys, lses = zip(*parts, strict=True)
    return np.concatenate(ys, axis=-2), np.concatenate(lses, axis=-1)


def _vjp_without_kernel(dy, q, k, v, spans, dlse, given):
    """[dq, dk, dv] and dbias by the formula, some rows at a time."""
    q, k, v = _spread(q, k, v)
    parts = [
        formula.softmax_attention_vjp(
            dy[..., rows, :],
            q[..., rows, :],
            k,
            v,
            dlse=None if dlse is None else dlse[..., rows],
            **few,
        )
        for rows, few in _row_blocks(q, k, spans, given)
    ]
    dqs, dks, dvs, *dbiases = zip(*parts, strict=True)
    found = [np.concatenate(dqs, axis=-2), sum(dks), sum(dvs)]
    return [*found, *(np.concatenate(parts, axis=-2) for parts in dbiases)]


def _spread(*arrays):
    """Each with the leading axes of all, as views."""
    lead = checks.lead(*arrays)
    return [np.broadcast_to(x, (*lead, *x.shape[-2:])) for x in arrays]


def _row_blocks(q, k, spans, given):
    """Slices of rows, and the options that say what these rows see."""
    n, m = q.shape[-2], k.shape[-2]
    mask, bias = (
        None if given[name] is None else np.broadcast_to(given[name], (*q.shape[:-2], n, m))
        for name in ("mask", "bias")
    )
    for start in range(0, max(n, 1), 64):
        rows = slice(start, start + 64)
        first, last = spans[rows, :1], spans[rows, 1:]
        seen = (first <= np.arange(m)) & (np.arange(m) < last)
        few = {
            "mask": seen if mask is None else seen & mask[..., rows, :],
            "bias": None if bias is None else bias[..., rows, :],
        }
        yield rows, {**given, **few}
