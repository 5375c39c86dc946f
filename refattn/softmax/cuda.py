"""Softmax attention on a GPU: arguments as in ``formula``, tiles by ``cuda_tiles``."""

import numpy as np

from refattn import checks, gpu
from refattn.dispatch import rows_of
from refattn.softmax import cuda_tiles, cuda_tiles_backward, cuda_tiles_queries, formula
from refattn.softmax.cuda_tiles import Given


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
    xp, q, k, v, dtype = gpu.qkv(q, k, v)
    spans = spans_of(xp, q, k.shape[-2], causal)
    pairs = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap}
    y, lse = over_spans(q, k, v, spans, dtype=dtype, **pairs)
    y = gpu.cast(xp, y, dtype)
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
    xp, q, k, v, dtype = gpu.qkv(q, k, v)
    rows = (*checks.lead(q, k, v), q.shape[-2])
    shape, compute = (*rows, v.shape[-1]), gpu.dtype_of(q)
    dy = gpu.cotangent(xp, q, "dy", dy, shape, dtype)
    if dlse is not None:
        dlse = gpu.cotangent(xp, q, "dlse", dlse, rows, compute)
    if saved is not None:
        checks.saved(_outlines(saved), shape, compute)
        named = zip(("saved y", "saved lse"), saved, (shape, rows))
        saved = [gpu.cotangent(xp, q, name, x, wanted, compute) for name, x, wanted in named]
    spans = spans_of(xp, q, k.shape[-2], causal)
    pairs = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap}
    found = over_spans_vjp(dy, q, k, v, spans, dlse=dlse, dtype=dtype, saved=saved, **pairs)
    return handed_out(found, q, k, v, bias, dtype)


def _outlines(saved):
    return tuple(map(gpu.outline, saved)) if isinstance(saved, (tuple, list)) else saved


def handed_out(found, q, k, v, bias, dtype):
    """dq, dk, dv and, where a bias came, dbias: in their inputs' shapes and dtype."""
    xp = gpu.namespace(q, k, v)
    shapes = [tuple(x.shape) for x in (q, k, v)]
    if bias is not None:
        shapes.append(gpu.shape_of(bias))
    pairs = zip(found, shapes, strict=True)
    return tuple(gpu.cast(xp, gpu.summed(xp, g, shape), dtype) for g, shape in pairs)


def spans_of(xp, q, m, causal=False):
    """(n, 2): the first and last + 1 of m keys that each query of q (..., n, d) may see."""
    i = gpu.positions(xp, q, q.shape[-2])
    if checks.flag("causal", causal):
        last = xp.clip(i + (m - q.shape[-2] + 1), 0, m)
    else:
        last = xp.full_like(i, m)
    return xp.stack([xp.zeros_like(i), last], axis=-1)


def some_rows(q, k, v, *, spans, **pairs):
    """``over_spans`` for arrays of any dtype: the attention of rows that stand where they stand."""
    xp, q, k, v, dtype = gpu.qkv(q, k, v)
    return gpu.cast(xp, over_spans(q, k, v, spans, dtype=dtype, **pairs)[0], dtype)


def some_rows_vjp(dy, q, k, v, *, spans, **pairs):
    """Gradient of ``some_rows``."""
    xp, q, k, v, dtype = gpu.qkv(q, k, v)
    dy = gpu.cotangent(xp, q, "dy", dy, (*checks.lead(q, k, v), q.shape[-2], v.shape[-1]), dtype)
    found = over_spans_vjp(dy, q, k, v, spans, dtype=dtype, **pairs)
    return handed_out(found, q, k, v, pairs.get("bias"), dtype)


@rows_of(formula.softmax_attention, backend="cuda")
def _some_rows(rows, n, m, *, mask=None, bias=None, causal=False, **options):
    """Spans of the rows that are left: causal needs no mask."""
    few = {"spans": spans_of(np, np.empty((n, 0)), m, causal)[rows], "mask": None, "bias": None}
    if mask is not None:
        outline = np.asarray(gpu.outline(mask))
        checks.fits("mask", outline, (*outline.shape[:-2], n, m))
        down = outline.ndim > 1 and outline.shape[-2] > 1
        few["mask"] = gpu.rows(mask, rows) if down else mask
    if bias is not None:
        shape = (*gpu.shape_of(bias)[:-2], n, m)
        checks.fits("bias", np.asarray(gpu.outline(bias)), shape)
        xp = gpu.namespace(bias)  # its gradient has a row for each query, whatever it has
        few["bias"] = gpu.rows(xp.broadcast_to(bias, shape), rows)
    return some_rows, some_rows_vjp, {**options, **few}


def over_spans(q, k, v, spans, *, dtype, mask=None, bias=None, scale=None, softcap=None):
    """Softmax attention of query i over the keys of ``spans[i]``: y and lse, in q's dtype.

    q, k, v as ``gpu.qkv`` gives them, ``dtype`` being the one that came in; spans int32
    (..., n, 2), whose leading axes broadcast to those of q, k and v.
    """
    given = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap}
    spans = gpu.placed(gpu.namespace(q, k, v), q, spans)
    xp, flat, heads, lead, numbers, has = _inputs(q, k, v, spans, dtype, **given)
    n, m, d, e = q.shape[-2], *k.shape[-2:], v.shape[-1]
    H, kind = heads.shape[0], gpu.dtype_of(q).type
    if 0 in (n, m, H):
        nothing = gpu.empty(xp, q, (*lead, n, e), kind, fill=0)
        return nothing, gpu.empty(xp, q, (*lead, n), kind, fill=-np.inf)
    if e == 0:
        v = gpu.empty(xp, v, (*v.shape[:-1], 1), kind, fill=0)
        y, lse = over_spans(q, k, v, spans, dtype=dtype, **given)
        return y[..., :0], lse
    y, lse = gpu.empty(xp, q, (H, n, e), kind), gpu.empty(xp, q, (H, n), kind)
    tile = cuda_tiles.tile_of(d, e, kind)
    blocks = -(-n // tile.rows) * H * -(-e // tile.e)
    inputs = (*flat, heads, numbers)
    kernel = cuda_tiles.make_attend(tile, d > tile.d, has, kind)
    gpu.launch(kernel, blocks, tile.threads, inputs, (y, lse))
    return xp.reshape(y, (*lead, n, e)), xp.reshape(lse, (*lead, n))


def over_spans_vjp(
    dy, q, k, v, spans, *, dtype, dlse=None, saved=None, mask=None, bias=None, scale=None,
    softcap=None
):  # fmt: skip
    """[dq, dk, dv] of ``over_spans``, and dbias where a bias came; leading axes not summed.

    ``saved`` is what ``over_spans`` gave, if that is still at hand.
    """
    given = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap}
    spans = gpu.placed(gpu.namespace(q, k, v), q, spans)
    xp, flat, heads, lead, numbers, has = _inputs(q, k, v, spans, dtype, **given)
    n, m, d, e = q.shape[-2], *k.shape[-2:], v.shape[-1]
    H, kind = heads.shape[0], gpu.dtype_of(q).type
    if e == 0:
        dy, v = (gpu.empty(xp, q, (*x.shape[:-1], 1), kind, fill=0) for x in (dy, v))
        saved = None if saved is None else (dy, saved[1])
        more = {"dlse": dlse, "saved": saved, "dtype": dtype, **given}
        dq, dk, dv, *rest = over_spans_vjp(dy, q, k, v, spans, **more)
        return [dq, dk, dv[..., :0], *rest]
    shapes, fill = [(H, n, d), (H, m, d), (H, m, e)], 0 if 0 in (n, m, H) else None
    found = [gpu.empty(xp, q, shape, kind, fill=fill) for shape in shapes]
    dbias = gpu.empty(xp, q, (H, n, m) if has.bias else (1, 1, 1), kind, fill=0)
    if fill is None:
        y, lse = saved or over_spans(q, k, v, spans, dtype=dtype, **given)
        of_rows = [x if x is None else _flat(xp, x, lead, H) for x in (dy, y, lse, dlse)]
        _launch_vjp(xp, *of_rows, (flat, heads, numbers, has, kind), *found, dbias)
    found = [xp.reshape(g, (*lead, *g.shape[1:])) for g in found]
    if has.bias:
        found.append(xp.reshape(dbias, (*lead, n, m)))
    return found


def _launch_vjp(xp, dy, y, lse, dlse, of_pairs, dq, dk, dv, dbias):
    """The three kernels of the gradient: of each row, of dk and dv, of dq and dbias."""
    flat, heads, numbers, has, kind = of_pairs
    q, *_, spans = flat
    (H, n, d), (_, m, e) = dq.shape, dv.shape
    tile = cuda_tiles_backward.tile_of(kind)
    tiles, parts_d, parts_e = -(-n // tile.rows), -(-d // tile.d), -(-e // tile.e)
    shifts = gpu.empty(xp, q, (2, H, n), kind)
    bounds = gpu.empty(xp, q, (len(spans), tiles, 4), np.int32)
    before = cuda_tiles_backward.make_before(tile.rows, dlse is not None, kind)
    dlse = gpu.empty(xp, q, (1, 1), kind) if dlse is None else dlse
    gpu.launch(before, tiles * H, tile.rows, (dy, y, lse, dlse, spans), (shifts, bounds))
    sliced = d > tile.d or e > tile.e
    inputs = dy, *flat, heads, bounds, numbers, shifts
    kernel = cuda_tiles_backward.make_attend_keys(tile, sliced, has, kind)
    blocks = -(-m // tile.keys) * H * max(parts_d, parts_e)
    gpu.launch(kernel, blocks, tile.threads, inputs, (dk, dv))
    kernel = cuda_tiles_queries.make_attend_queries(tile, sliced, has, kind)
    gpu.launch(kernel, tiles * H * parts_d, tile.threads, inputs, (dq, dbias))


def _flat(xp, x, lead, H):
    """(..., n, e) as (H, n, e), in C order."""
    return xp.reshape(gpu.contiguous(xp, x), (H, *x.shape[len(lead) :]))


def _inputs(q, k, v, spans, dtype, mask, bias, scale, softcap):
    """xp; q, k, v, mask, bias and spans as the kernels take them, one number for what is not there;
    heads, leading shape, (scale, softcap) and which of mask, bias and softcap came."""
    xp, compute = gpu.namespace(q, k, v), gpu.dtype_of(q)
    shape = (*checks.lead(q, k, v), q.shape[-2], k.shape[-2])
    has = Given(mask is not None, bias is not None, softcap is not None)
    if mask is not None:
        checks.boolean_mask(gpu.outline(mask), shape)
        mask = _at_least_2d(xp, gpu.placed(xp, q, mask))
    if bias is not None:
        bias = gpu.real_option(xp, q, "bias", bias, dtype)
        checks.fits("bias", gpu.outline(bias), shape)
        bias = _at_least_2d(xp, bias)
    scale = checks.scale(scale, q.shape[-1])
    softcap = 1.0 if softcap is None else checks.number("softcap", softcap, positive=True)
    nothing = gpu.empty(xp, q, (1, 1), compute)
    there = [nothing if x is None else x for x in (mask, bias)]
    flat, heads, lead = gpu.heads_of(xp, q, k, v, *there, spans)
    return xp, flat, heads, lead, (compute.type(scale), compute.type(softcap)), has


def _at_least_2d(xp, x):
    return xp.reshape(x, (1,) * (2 - len(x.shape)) + tuple(x.shape))
