"""Who sees whom, as a dense mask, of any attention that weighs pairs by a softmax."""

import numpy as np

from refattn import masks


def visible(n, m, options):
    """(..., n, m) bool: the pairs that mask, bias, window and causal leave; with ``top_left``,
    query i stands at key i, else at key i + (m - n)."""
    seen = np.ones((n, m), bool)
    mask = options.get("mask")
    if mask is not None:
        seen = seen & (mask.toarray() if hasattr(mask, "indptr") else mask)
    if options.get("bias") is not None:
        seen = seen & (np.asarray(options["bias"], float) > -np.inf)
    first = options.get("top_left", False)
    if "window" in options:
        window = {x: options[x] for x in ("window", "causal", "dilation") if x in options}
        size = {"n": max(n, m)} if first else {"n": n, "m": m}
        seen = seen & masks.local(**size, **window).toarray()[:n, :m]
    elif options.get("causal"):
        seen = seen & (np.arange(m) <= stands_at(n, m, options))
    return seen


def stands_at(n, m, options):
    """The key that each query stands at, (n, 1)."""
    return np.arange(n)[:, None] + (0 if options.get("top_left") else m - n)
