import numpy as np

from cases import Mechanism
from definitions import performer as definitions
from mechanisms.linear import dead as dead_keys
from mechanisms.linear import key_mask, sees

M = 4  # rows of omega


def omega(s, rng):
    return rng.standard_normal((M, s.d))


def sizes(options, shape):
    sizes = {**options, "num_features": len(options["omega"])}
    del sizes["omega"]
    if "key_mask" in options:
        sizes["key_mask"] = int(options["key_mask"].sum())
    return sizes


def dead(shape, rng):
    options, dead_q, dead_k = dead_keys(shape, rng)
    return {**options, "omega": omega(shape, rng)}, dead_q, dead_k


def exponent_size(q, k, options):
    """The largest sum of absolute terms in an exponent of a query plus that of a key."""
    scale = options.get("scale") or q.shape[-1] ** -0.5
    w = abs(options["omega"]).T  # (d, M)
    size = 0.0
    for x in (q, k):
        t = scale**0.5 * (abs(x) @ w).max(axis=-1) + scale * (x * x).sum(axis=-1) / 2
        size += t.max(initial=0)
    return 1 + size


def condition(q, k, options):
    """Of trig's denominators: absolute terms over the sum. Other kinds have no signs."""
    if options.get("kind") != "trig":
        return 1.0
    n, m = q.shape[-2], k.shape[-2]
    root = (options.get("scale") or q.shape[-1] ** -0.5) ** 0.5
    t, u = (root * x @ options["omega"].T for x in (q, k))
    h = root**2 * (k * k).sum(axis=-1) / 2
    seen = np.tri(n, m, dtype=bool) if options.get("causal") else np.ones((n, m), bool)
    seen = seen & options.get("key_mask", np.ones(m, bool))
    h = np.where(seen, h[..., None, :], -np.inf)
    size = np.exp(h - h.max(axis=-1, keepdims=True, initial=-1e300))
    parts = np.cos(t), np.cos(u), np.sin(t), np.sin(u)
    terms = abs(parts[0]) @ abs(parts[1]).mT + abs(parts[2]) @ abs(parts[3]).mT
    signed = parts[0] @ parts[1].mT + parts[2] @ parts[3].mT
    den, whole = abs((size * signed).sum(axis=-1)), (size * terms).sum(axis=-1)
    return (whole[den > 0] / den[den > 0]).max(initial=1.0)


def relative(q, k, options, eps):
    m, d = k.shape[-2:]
    return eps * (2 * (d + 4) * exponent_size(q, k, options) + m + 4 * M + 16)


def tolerance(q, k, v, options, eps):
    """A feature is relatively off by its exponent's error; then as linear attention."""
    c = condition(q, k, options)
    return relative(q, k, options, eps) * c * (1 + c) * abs(v).max(initial=0)


def gradient_tolerance(q, k, v, dy, options, eps):
    """Sums of m n terms of that relative size, times omega - x."""
    c = condition(q, k, options)
    size = 1 + max(abs(x).max(initial=0) for x in (q, k, v, dy, options["omega"]))
    return 4 * relative(q, k, options, eps) * c**3 * (len(q) + 1) * size**4


OPTIONS = {
    "positive": lambda s, rng: {"omega": omega(s, rng)},
    "hyperbolic": lambda s, rng: {"omega": omega(s, rng), "kind": "hyperbolic"},
    "trig": lambda s, rng: {"omega": omega(s, rng), "kind": "trig"},
    "scale": lambda s, rng: {"omega": omega(s, rng), "scale": 0.3},
    "key_mask": lambda s, rng: {"omega": omega(s, rng), "key_mask": key_mask(s, rng)},
}
OPTIONS |= {
    f"causal-{label}": lambda s, rng, make=make: {**make(s, rng), "causal": True}
    for label, make in OPTIONS.items()
}
OPTIONS["causal-trig-key_mask"] = lambda s, rng: {
    "omega": omega(s, rng),
    "kind": "trig",
    "causal": True,
    "key_mask": key_mask(s, rng),
}

MECHANISMS = [
    Mechanism(
        "performer_attention",
        definitions.performer_attention,
        sees,
        OPTIONS,
        takes=lambda label, s: s.n == s.m or not label.startswith("causal"),
        signed=tuple(label for label in OPTIONS if "trig" in label),
        cost_sizes=sizes,
        counted=definitions.performer_attention_shifted,
        dead=dead,
        tolerance=tolerance,
        gradient_tolerance=gradient_tolerance,
    )
]
