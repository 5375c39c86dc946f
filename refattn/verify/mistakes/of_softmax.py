"""Mistakes in scores, masks, windows and the softmax itself."""

import numpy as np

import refattn
from refattn import checks
from refattn.verify.mistakes.base import (
    SCALED,
    SOFTMAX,
    Mistake,
    changed,
    scale_of,
    without,
)
from refattn.verify.visible import stands_at, visible


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


def _maximum_not_subtracted(run, q, k, v, options):
    """What float32 gives: infinities over infinities where a score passes 88."""
    s, seen = weights(q, k, options)
    with np.errstate(over="ignore"):
        a = np.where(seen, np.exp(s.astype(np.float32)), 0)
    total = a.sum(axis=1, keepdims=True)
    return (a / np.where(total == 0, 1, total)) @ v


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


def _bottom_right(run, q, k, v, options):
    """Aligned at the last key, where the kernel's library aligns at the first."""
    if not (options.get("causal") and options.get("top_left")):
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


def _window(change):
    """A window whose sides are a little other than asked for."""

    def output(run, q, k, v, options):
        left, right = checks.window(options["window"])
        sides = change(left, right)
        if min(sides) < 0:
            return None
        return run(q, k, v, **changed(options, window=sides))

    return output


def _tail_dropped(tile):
    """Keys beyond the last whole tile are not read."""

    def output(run, q, k, v, options):
        whole = len(k) // tile * tile
        if not 0 < whole < len(k):
            return None
        seen = visible(len(q), len(k), options) & (np.arange(len(k)) < whole)
        return _masked(seen, q, k, v, options)

    return output


def _empty_rows_mean(run, q, k, v, options):
    empty = ~visible(len(q), len(k), options).any(axis=1)
    y = run(q, k, v, **options)
    return np.where(empty[:, None], v.mean(axis=0), y) if empty.any() else None


def _empty_rows_nan(run, q, k, v, options):
    empty = ~visible(len(q), len(k), options).any(axis=1)
    y = run(q, k, v, **options)
    return np.where(empty[:, None], np.nan, y) if empty.any() else None


MISTAKES = [
    Mistake(
        "scale missing",
        "the scores are q . k, not q . k / sqrt(d)",
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
        "the scores are multiplied by sqrt(d) instead of divided",
        SCALED,
        _rescaled(lambda scale, q, v, o: 1 / scale if scale not in (-1, 0, 1) else None),
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
        "bottom-right alignment",
        "the last query stands at the last key; this library aligns at the first",
        ("softmax_attention",),
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
        "dilation ignored", "the window has no gaps", ("local_attention",), without("dilation")
    ),
    Mistake(
        "window one short on the left",
        "left is exclusive: the farthest key before the query is missing",
        ("local_attention",),
        _window(lambda left, right: (left - 1, right)),
    ),
    Mistake(
        "window one short on the right",
        "right is exclusive: the farthest key after the query is missing",
        ("local_attention",),
        _window(lambda left, right: (left, right - 1)),
    ),
    Mistake(
        "window one short on both sides",
        "both ends are exclusive",
        ("local_attention",),
        _window(lambda left, right: (left - 1, right - 1)),
    ),
    Mistake(
        "window one long on both sides",
        "there is a key too many at each end",
        ("local_attention",),
        _window(lambda left, right: (left + 1, right + 1)),
    ),
    Mistake(
        "window on one side only",
        "no key after the query is seen",
        ("local_attention",),
        _window(lambda left, right: (left, 0) if right else (-1, -1)),
    ),
    Mistake(
        "normaliser forgotten",
        "the weights do not sum to one: exp(s - max) is not divided by its sum",
        SOFTMAX,
        _unnormalised,
    ),
    Mistake(
        "maximum not subtracted",
        "exp overflows where scores are large: subtract each row's maximum first",
        SOFTMAX,
        _maximum_not_subtracted,
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
        )
        for tile in (16, 32, 64, 128)
    ),
    Mistake(
        "empty row gives the mean",
        "a query with nothing to attend gets the mean of v; here it gets 0",
        SOFTMAX,
        _empty_rows_mean,
    ),
    Mistake(
        "empty row gives NaN",
        "a query with nothing to attend gets NaN; here it gets 0",
        SOFTMAX,
        _empty_rows_nan,
    ),
]
