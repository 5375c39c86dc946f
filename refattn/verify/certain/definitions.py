"""Every attention once more, for balls: pair by pair, from the papers, with gradients for free.

Each takes (inputs, options, rows): ``inputs`` holds the leaves, balls of q, k, v and of the options
that are arrays; ``rows`` are the query positions that are wanted. Nothing of the formulas' code is
used: who sees whom, features, blocks and gates are stated again.
"""

import numpy as np

from refattn.verify.certain.ball import joined


def softmax_attention(inputs, options, rows):
    q, k, v = inputs["q"][..., rows, :], inputs["k"], inputs["v"]
    s = q @ k.mT * scale_of(inputs, options)
    if options.get("softcap") is not None:
        cap = options["softcap"]
        s = s.over(constant(inputs, cap)).tanh() * cap
    if "bias" in inputs:
        s = s + some_rows(inputs["bias"], rows)
    return weighed(s, visible_pairs(inputs["q"].shape[-2], k.shape[-2], options, rows), v)


def local_attention(inputs, options, rows):
    return softmax_attention(inputs, options, rows)


def sparse_attention(inputs, options, rows):
    return softmax_attention(inputs, options, rows)


def linformer_attention(inputs, options, rows):
    E = inputs["E"]
    F = inputs.get("F", E)
    seen = keys_of(inputs, options)[..., None, :]
    k = E.where(seen) @ inputs["k"]
    v = F.where(seen) @ inputs["v"]
    s = inputs["q"][..., rows, :] @ k.mT * scale_of(inputs, options)
    return weighed(s, np.ones((1, k.shape[-2]), bool), v)


def linear_attention(inputs, options, rows):
    of_query, of_key = features_of(options.get("feature_map", "elu"))
    seen = keys_of(inputs, options)
    phi_q = of_query(inputs["q"][..., rows, :])
    phi_k = of_key(inputs["k"], seen)
    pairs = key_pairs(inputs, options, rows)
    w = (phi_q @ phi_k.mT).where(pairs)
    num, den = w @ inputs["v"], w.sum(-1, keepdims=True)
    if "S0" in inputs:
        num, den = num + phi_q @ inputs["S0"], den + phi_q @ inputs["z0"][..., None]
    parts = {"y": num.over(den) if options.get("normalize", True) else num}
    if options.get("return_state"):
        kept = phi_k.where(seen[..., None])
        S, z = kept.mT @ inputs["v"], kept.sum(-2)
        parts |= {"S": S + inputs["S0"] if "S0" in inputs else S}
        parts |= {"z": z + inputs["z0"] if "z0" in inputs else z}
    return parts


def linear_attention_chunked(inputs, options, rows):
    return linear_attention(inputs, {"causal": True, **options}, rows)


def performer_attention(inputs, options, rows):
    """Exponents of a pair's feature are those of the query and of the key together; all of a query
    are lessened by about their largest, which divides out."""
    seen = keys_of(inputs, options)
    root = scale_of(inputs, options).root()
    kind, omega = options.get("kind", "positive"), inputs["omega"]
    causal = options.get("causal", False)
    a, on_query = exponents(inputs["q"][..., rows, :] * root, omega, kind)
    b, on_key = exponents(inputs["k"] * root, omega, kind)
    pairs = key_pairs(inputs, options, rows)
    met = seen & (np.arange(seen.shape[-1]) <= max(rows, default=-1)) if causal else seen
    top = shift_of(b, -2, met[..., None])
    of_rows = (a.float_mid() + top).max(axis=-1, keepdims=True, initial=-np.inf)
    phi_k = (b - top).where(met[..., None]).exp().where(met[..., None])
    phi_q = (a + top - of_rows).exp()
    phi_q, phi_k = on_query(phi_q), on_key(phi_k)
    w = (phi_q @ phi_k.mT).where(pairs)
    return {"y": (w @ inputs["v"]).over(w.sum(-1, keepdims=True))}


RISE = 200.0  # of a band's exponents: e^200 leaves double-double all its digits


def cuts_of_exponents(inputs, options):
    """Where causal queries must be cut, so that the shift of a band's exponents, the largest of all
    keys that its last row sees, buries none that its first row sees."""
    root, kind = scale_of(inputs, options).root(), options.get("kind", "positive")
    b, _ = exponents(inputs["k"].plain * root, inputs["omega"].plain, kind)
    b = np.where(keys_of(inputs, options)[..., None], b.float_mid(), -np.inf)
    top = np.moveaxis(np.maximum.accumulate(b, axis=-2), -2, 0)  # (m, ...)
    cuts, first = set(), 0
    for i in range(1, len(top)):
        if not (top[i] <= top[first] + RISE).all():
            cuts.add(i)
            first = i
    return cuts


def exponents(x, omega, kind):
    """The exponents of x's features, and what multiplies their exponentials."""
    t, half = x @ omega.mT, (x * x).sum(-1, keepdims=True) * 0.5
    if kind == "positive":
        return t - half, lambda e: e
    if kind == "hyperbolic":
        return joined([t - half, -t - half], -1), lambda e: e
    cos, sin = t.cos_sin()
    turned = joined([cos, sin], -1)
    return half, lambda e: turned * e


def block_attention(inputs, options, rows):
    fuse, block = options.get("fuse", "concat"), options["block"]
    n, m = inputs["q"].shape[-2], inputs["k"].shape[-2]
    if fuse == "exact":  # whatever the blocks, all keys together
        return softmax_attention(inputs, {"scale": options.get("scale")}, rows)
    if fuse == "concat":
        own = np.arange(n)[:, None] // block == np.arange(m) // block
        kept = {"scale": options.get("scale"), "mask": own}
        return softmax_attention(inputs, kept, rows)
    parts = []
    for start in range(0, n, block):
        part = {x: inputs[x][..., start : start + block, :] for x in "qkv"}
        y = softmax_attention(part, {"scale": options.get("scale")}, np.arange(block))["y"]
        if fuse == "weighted":
            y = y * inputs["weights"][..., start // block, None, None]
        parts.append(y[..., None, :, :])
    if not parts:
        return {"y": inputs["v"].sum(-2, keepdims=True) + np.zeros((block, 1))}
    together = joined(parts, -3)
    if fuse == "max":
        return {"y": together.first_largest(len(together.shape) - 3)}
    y = together.sum(-3)
    return {"y": y.over(constant(inputs, len(parts))) if fuse == "mean" else y}


def two_level_attention(inputs, options, rows):
    """Every query's own block key by key, and a summary of each block for the queries outside."""
    block, n = options["block"], inputs["k"].shape[-2]
    cuts = [slice(i, min(i + block, n)) for i in range(0, n, block)]
    far = {x: [] for x in "kv"}
    for own in cuts:
        for x in "kv":
            part = inputs[x][..., own, :]
            if options.get("pool", "mean") == "max":
                pooled = part.first_largest(len(part.shape) - 2)
            else:
                pooled = part.sum(-2).over(constant(inputs, own.stop - own.start))
            far[x].append(pooled[..., None, :])
    q = inputs["q"][..., rows, :]
    k, v = joined([inputs["k"], *far["k"]], -2), joined([inputs["v"], *far["v"]], -2)
    log_size = constant(inputs, [own.stop - own.start for own in cuts]).log()
    mass = joined([constant(inputs, np.zeros(n)), log_size], -1)
    at = np.asarray(rows)[:, None] // block
    near = at == np.arange(n) // block
    return weighed(
        q @ k.mT * scale_of(inputs, options) + mass,
        np.concatenate([near, at != np.arange(len(cuts))], axis=-1),
        v,
    )


def gated_attention(inputs, options, rows):
    gate = some_rows(inputs["gate"], rows)
    inner = {x: y for x, y in options.items() if x not in ("gate", "attention")}
    name = getattr(options.get("attention"), "__name__", "softmax_attention")
    if name not in DEFINITIONS:
        raise ValueError(f"attention is {name!r}: with more digits only {', '.join(DEFINITIONS)}")
    y = DEFINITIONS[name](inputs, inner, rows)["y"]
    opened = (np.atleast_1d(gate.float_mid()) != 0).any(axis=-1, keepdims=True)
    return {"y": (gate * y).where(opened)}


DEFINITIONS = {
    f.__name__: f
    for f in (
        softmax_attention,
        local_attention,
        sparse_attention,
        linear_attention,
        linear_attention_chunked,
        linformer_attention,
        performer_attention,
        block_attention,
        two_level_attention,
        gated_attention,
    )
}


def weighed(s, pairs, v):
    """Softmax over the pairs, times v; 0 and -inf where there are none."""
    top = shift_of(s, -1, pairs)
    some = pairs.any(axis=-1, keepdims=True)
    p = (s - top).where(pairs).exp().where(pairs)
    l = p.sum(-1, keepdims=True)
    whole = (l + np.where(some, 0.0, 1.0)).log() + top
    return {"y": (p @ v).over(l), "lse": whole[..., 0], "empty": ~some[..., 0]}


def shift_of(x, axis, seen):
    """The largest of what is seen along an axis, in float64; 0 where there is none."""
    look = np.where(seen, x.float_mid(), -np.inf)
    top = look.max(axis=axis, keepdims=True, initial=-np.inf)
    return np.where(np.isfinite(top), top, 0)


def constant(inputs, x):
    return inputs["q"]._ball(np.asarray(x, float))


def scale_of(inputs, options):
    """The number that came, or 1/sqrt(d) exactly, not its nearest float64."""
    if options.get("scale") is not None:
        return constant(inputs, options["scale"])
    return constant(inputs, 1).over(constant(inputs, inputs["q"].shape[-1]).root())


def keys_of(inputs, options):
    """(..., m) bool: keys that may be attended."""
    m = inputs["k"].shape[-2]
    mask = options.get("key_mask")
    return np.broadcast_to(True if mask is None else mask, (*np.shape(mask)[:-1], m))


def key_pairs(inputs, options, rows):
    """(..., rows, m) bool: who sees whom where keys are masked and queries stand at their keys."""
    seen = keys_of(inputs, options)
    pairs = np.broadcast_to(seen[..., None, :], (*seen.shape[:-1], len(rows), seen.shape[-1]))
    if not options.get("causal"):
        return pairs
    return pairs & (np.arange(seen.shape[-1]) <= np.asarray(rows)[:, None])


def some_rows(x, rows):
    """Those rows of what broadcasts to (..., n, any)."""
    return x[..., rows, :] if len(x.shape) > 1 and x.shape[-2] > 1 else x


def visible_pairs(n, m, options, rows):
    """(..., rows, m) bool: who sees whom."""
    at = np.asarray(rows)[:, None] + (m - n)  # where the queries stand
    steps = np.arange(m) - at
    seen = np.ones(steps.shape, bool)
    mask = options.get("mask")
    if mask is not None:
        sparse = hasattr(mask, "toarray")
        seen = seen & (mask[rows].toarray() if sparse else some_rows(np.asarray(mask), rows))
    if options.get("bias") is not None:
        seen = seen & (some_rows(np.asarray(options["bias"], float), rows) != -np.inf)
    if "window" in options:
        window, dilation = options["window"], options.get("dilation", 1)
        left, right = window if isinstance(window, (tuple, list)) else (window, window)
        seen = seen & (steps >= -left * dilation) & (steps <= right * dilation)
        seen = seen & (steps % dilation == 0)
    return seen & (steps <= 0) if options.get("causal") else seen


def softmax_over(x, axis, seen=True):
    p = (x - shift_of(x, axis, seen)).where(seen).exp().where(seen)
    return p.over(p.sum(axis, keepdims=True))


def elu(x, seen=True):
    above = x.float_mid() > 0
    return (x + 1).where(above) + x.where(~above).exp().where(~above)


def relu(x, seen=True):
    return x.where(x.float_mid() > 0)


def taylor(x, seen=True):
    """1, x_c, and x_b x_c for b <= c, the squares divided by sqrt(2)."""
    d = x.shape[-1]
    one = x._ball(np.ones((*x.shape[:-1], 1)))
    half = x._ball(np.asarray(0.5)).root()
    parts = [one, x]
    for b in range(d):
        parts.append(x[..., b : b + 1] * x[..., b : b + 1] * half)
        if b + 1 < d:
            parts.append(x[..., b : b + 1] * x[..., b + 1 :])
    return joined(parts, -1)


FEATURES = {"elu": elu, "relu": relu, "taylor": taylor, "identity": lambda x, seen=True: x}
FEATURES["exp"] = lambda x, seen=True: x.exp()
FEATURES["softmax_over_features"] = lambda x, seen=True: softmax_over(x, -1)
FEATURES["softmax_over_positions"] = lambda x, seen: softmax_over(x, -2, seen[..., None])
FEATURES["softmax"] = FEATURES["softmax_over_features"], FEATURES["softmax_over_positions"]


def features_of(feature_map):
    """What makes features of a query and of a key, by name, or by the names of a FeatureMap's
    functions."""
    names = [getattr(getattr(feature_map, x, None), "__name__", None) for x in ("query", "key")]
    if isinstance(feature_map, str):
        names = [feature_map] * 2
    for name in names:
        if name not in FEATURES:
            known = ", ".join(FEATURES)
            raise ValueError(
                f"a feature map made of {name!r} cannot be computed with more digits: only {known}"
            )
    pair = [FEATURES[name] for name in names]
    return pair[0] if isinstance(pair[0], tuple) else pair
