"""Mistakes in scores, masks, windows and the softmax itself."""

import numpy as np

import refattn
from refattn.verify.mistakes.base import (
    SCALED,
    SOFTMAX,
    Mistake,
    changed,
    scale_of,
    without,
)
from refattn.verify.visible import stands_at, visible

OVERFLOWS = (np.float32, 88), (np.float64, 709)  # exp of more is infinite


def _rescaled(factor):
    """The right attention at another scale; None where that would be the same."""

    def output(run, q, k, v, options):
        scale = factor(scale_of(q, options), q, v, options)
        return None if scale is None else run(q, k, v, **changed(options, scale=scale))

    return output


def weights(q, k, options):
    """exp of the scores less the row's maximum, and who may be seen, of a softmax attention."""
    s = scale_of(q, options) * (q @ k.mT)
    if options.get("softcap"):
        s = options["softcap"] * np.tanh(s / options["softcap"])
    if options.get("bias") is not None:
        s = s + options["bias"]
    seen = visible(len(q), len(k), options)
    return np.where(seen, s, -np.inf), seen


def _masked(seen, q, k, v, options):
    """Softmax attention over these pairs, with the options that are not about who sees whom."""
    kept = {key: x for key, x in options.items() if key in ("scale", "softcap", "bias")}
    return refattn.softmax_attention(q, k, v, mask=seen, **kept)


def _unnormalised(run, q, k, v, options):
    s, _ = weights(q, k, options)
    return np.exp(s - s.max(axis=1, keepdims=True, initial=-1e300)) @ v


def _exponentials(dtype, divided):
    """exp(s) as a dtype gives it, infinite where a score passes 88 or 709; then over its sum."""

    def output(run, q, k, v, options):
        s, seen = weights(q, k, options)
        a = np.where(seen, np.exp(s.astype(dtype)), 0)
        total = a.sum(axis=1, keepdims=True)
        return (a / np.where(total == 0, 1, total) if divided else a) @ v

    return output


def _over_queries(run, q, k, v, options):
    s, seen = weights(q, k, options)
    a = np.exp(s - s.max(axis=0, keepdims=True, initial=-1e300))
    total = a.sum(axis=0, keepdims=True)
    return np.where(seen, a / np.where(total == 0, 1, total), 0) @ v


def _strict(run, q, k, v, options):
    if not options.get("causal") or "window" in options:
        return None
    n, m = len(q), len(k)
    before = np.arange(m) < stands_at(n, m, options)
    return _masked(visible(n, m, options) & before, q, k, v, options)


def _top_left(run, q, k, v, options):
    """Aligned at the first key: the same where n = m."""
    if not (options.get("causal") or "window" in options) or options.get("top_left"):
        return None
    n, m = len(q), len(k)
    free = {key: x for key, x in options.items() if key not in ("causal", "window", "dilation")}
    if "window" in options:
        window = {x: options[x] for x in ("window", "causal", "dilation") if x in options}
        seen = refattn.masks.local(max(n, m), **window).toarray()[:n, :m]
    else:
        seen = np.arange(m) <= np.arange(n)[:, None]
    return _masked(seen & visible(n, m, free), q, k, v, options)


def _last_row_free(run, q, k, v, options):
    """Aligned at the first key, but for the last query, which sees every key."""
    if not options.get("causal") or "window" in options:
        return None
    seen = np.tri(len(q), len(k), dtype=bool)
    seen[-1] = True
    free = {key: x for key, x in options.items() if key not in ("causal", "top_left")}
    return _masked(seen & visible(len(q), len(k), free), q, k, v, options)


def _bottom_right(run, q, k, v, options):
    """Aligned at the last key, where the kernel's library aligns at the first."""
    bounded = options.get("causal") or "window" in options
    if not (bounded and options.get("top_left")):
        return None
    return run(q, k, v, **changed(options, top_left=False))


def _inverted(run, q, k, v, options):
    mask = options.get("mask")
    if mask is None:
        return None
    dense = mask.toarray() if hasattr(mask, "indptr") else np.asarray(mask)
    seen = visible(len(q), len(k), {key: x for key, x in options.items() if key != "mask"}) & ~dense
    return _masked(seen, q, k, v, options)


def _transposed_mask(run, q, k, v, options):
    mask = options.get("mask")
    if not hasattr(mask, "indptr") or mask.shape[0] != mask.shape[1]:
        return None
    return _masked(mask.T.toarray(), q, k, v, options)


def _softcap_after_mask(run, q, k, v, options):
    """tanh(-inf) = -1: hidden keys come back with the score -softcap."""
    if not options.get("softcap"):
        return None
    cap, n, m = options["softcap"], len(q), len(k)
    s = scale_of(q, options) * (q @ k.mT)
    if options.get("bias") is not None:
        s = s + options["bias"]
    s = cap * np.tanh(np.where(visible(n, m, options), s, -np.inf) / cap)
    a = np.exp(s - s.max(axis=1, keepdims=True, initial=-1e300))
    return (a / a.sum(axis=1, keepdims=True)) @ v if m else None


def _tail_dropped(tile):
    """Keys beyond the last whole tile are not read."""

    def output(run, q, k, v, options):
        whole = len(k) // tile * tile
        if not 0 < whole < len(k):
            return None
        seen = visible(len(q), len(k), options) & (np.arange(len(k)) < whole)
        return _masked(seen, q, k, v, options)

    return output


def _empty_rows(value):
    """Queries with nothing to attend get ``value(v)``."""

    def output(run, q, k, v, options):
        empty = ~visible(len(q), len(k), options).any(axis=1)
        if not empty.any():
            return None
        return np.where(empty[:, None], value(v), run(q, k, v, **options))

    return output


def _mean(v):
    return v.mean(axis=0) if len(v) else np.zeros(v.shape[1])


def _scale_ignored(run, q, k, v, options):
    usual = q.shape[1] ** -0.5
    if options.get("scale") in (None, usual):
        return None
    return run(q, k, v, **changed(options, scale=usual))


MISTAKES = [
    Mistake(
        "scale missing",
        "the scores are q . k: the factor on them is missing",
        SCALED,
        _rescaled(lambda scale, q, v, o: 1.0 if scale != 1 else None),
    ),
    Mistake(
        "scale squared",
        "the scale is applied twice",
        SCALED,
        _rescaled(lambda scale, q, v, o: scale**2 if scale not in (0, 1) else None),
    ),
    Mistake(
        "scale upside down",
        "the scores are divided by the factor on them, not multiplied with it",
        SCALED,
        _rescaled(lambda scale, q, v, o: 1 / scale if scale not in (-1, 0, 1) else None),
    ),
    Mistake(
        "scale ignored",
        "the scores are q . k / sqrt(d), whatever scale is asked for",
        SCALED,
        _scale_ignored,
    ),
    Mistake(
        "exp2 taken for exp",
        "2 is raised to the scores, not e: they lack a factor of log2(e)",
        SOFTMAX,
        _rescaled(lambda scale, q, v, o: scale * np.log(2) if scale else None),
    ),
    Mistake(
        "scale of the wrong dimension",
        "the scale is 1/sqrt(e), of the values' columns, not of the keys'",
        SCALED,
        _rescaled(
            lambda scale, q, v, o: (
                v.shape[1] ** -0.5
                if o.get("scale") is None and v.shape[1] not in (0, q.shape[1])
                else None
            )
        ),
    ),
    Mistake(
        "strict causal",
        "a query does not see its own key: j < i instead of j <= i",
        ("softmax_attention",),
        _strict,
    ),
    Mistake(
        "top-left alignment",
        "query i stands at key i; with n != m the last query should stand at the last key",
        ("softmax_attention", "local_attention"),
        _top_left,
    ),
    Mistake(
        "last row unmasked",
        "query i stands at key i, but the last query sees every key",
        ("softmax_attention",),
        _last_row_free,
    ),
    Mistake(
        "bottom-right alignment",
        "the last query stands at the last key; this library aligns at the first",
        ("softmax_attention", "local_attention"),
        _bottom_right,
    ),
    Mistake(
        "mask inverted",
        "pairs that the mask forbids are seen, and the others are not",
        ("softmax_attention", "sparse_attention"),
        _inverted,
    ),
    Mistake(
        "mask transposed",
        "rows and columns of the mask are swapped",
        ("sparse_attention",),
        _transposed_mask,
    ),
    Mistake("mask ignored", "all pairs are seen", ("softmax_attention",), without("mask")),
    Mistake("bias ignored", "the bias is not added", ("softmax_attention",), without("bias")),
    Mistake(
        "softcap missing", "the scores are not capped", ("softmax_attention",), without("softcap")
    ),
    Mistake(
        "softcap after mask",
        "tanh is applied to -inf, so hidden keys come back",
        ("softmax_attention",),
        _softcap_after_mask,
    ),
    Mistake(
        "normaliser forgotten",
        "the weights do not sum to one: exp(s - max) is not divided by its sum",
        SOFTMAX,
        _unnormalised,
    ),
    *(
        Mistake(
            "maximum not subtracted",
            f"exp overflows where scores pass {most}: subtract each row's maximum first",
            SOFTMAX,
            _exponentials(dtype, divided=True),
        )
        for dtype, most in OVERFLOWS
    ),
    *(
        Mistake(
            "neither maximum nor normaliser",
            f"y is exp(scores) v: nothing is divided, and exp overflows where scores pass {most}",
            SOFTMAX,
            _exponentials(dtype, divided=False),
        )
        for dtype, most in OVERFLOWS
    ),
    Mistake(
        "softmax over the wrong axis",
        "the weights of a key sum to one, not those of a query",
        SOFTMAX,
        _over_queries,
    ),
    *(
        Mistake(
            "tail tile dropped",
            f"keys beyond the last whole tile of {tile} are not read",
            ("softmax_attention", "local_attention", "sparse_attention"),
            _tail_dropped(tile),
            number=str(tile),
        )
        for tile in (16, 32, 64, 128)
    ),
    Mistake(
        "empty row gives the mean",
        "a query with nothing to attend gets the mean of v, which is not this convention's value",
        SOFTMAX,
        _empty_rows(_mean),
    ),
    Mistake(
        "empty row gives NaN",
        "a query with nothing to attend gets NaN, which is not this convention's value",
        SOFTMAX,
        _empty_rows(lambda v: np.nan),
    ),
    Mistake(
        "empty row gives 0",
        "a query with nothing to attend gets 0, which is not this convention's value",
        SOFTMAX,
        _empty_rows(lambda v: 0.0),
    ),
]
