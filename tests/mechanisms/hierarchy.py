import math

from cases import Mechanism, logit_size, softmax_gradient_tolerance, softmax_tolerance
from definitions import hierarchy as definitions


def cut(s):
    """A block that divides n: its smallest divisor from 2 on, but 1 where n is prime."""
    divisors = [b for b in range(2, s.n) if s.n % b == 0]
    return min(divisors, default=1)


def fused(fuse):
    return lambda s, rng: {"block": cut(s), "fuse": fuse}


def weighted(s, rng):
    weights = rng.standard_normal(s.n // cut(s))
    return {"block": cut(s), "fuse": "weighted", "weights": weights}


def sees(i, j, shape, options):
    same = i // options["block"] == j // options["block"]
    return same if options.get("fuse", "concat") == "concat" else True


def sizes(options, shape):
    return {**options, "weights": len(options["weights"])} if "weights" in options else options


def growth(q, k, v, options, eps):
    """The docstring's bound over that of the parts, which is softmax_attention's."""
    part = softmax_tolerance(q, k, v, options, eps)
    unit = eps * abs(v).max(initial=0)
    m, fuse = k.shape[-2], options.get("fuse", "concat")
    parts = -(-m // options["block"])
    if fuse in ("concat", "max"):
        return part
    if fuse == "exact":
        return 2 * part + parts * (logit_size(q, k, options) + math.log(max(m, 1)) + 8) * unit
    size = {"sum": parts, "mean": 1}.get(fuse)
    size = abs(options["weights"]).sum() if size is None else size
    return size * (part + (parts + 2) * unit)


def gradient_tolerance(q, k, v, dy, options, eps):
    """That of the parts, larger as the output's bound is; dweights sums block e outputs' errors."""
    larger = growth(q, k, v, options, eps)
    part = softmax_tolerance(q, k, v, options, eps)
    ratio = larger / part if part else 1
    parts = softmax_gradient_tolerance(q, k, v, dy, options, eps) * max(1, ratio)
    if options.get("fuse") == "exact":
        return 2 * parts  # a softmax inside, and one over the parts
    return parts + (dy.size * abs(dy).max(initial=0) * part if "weights" in options else 0)


def two_level_size(q, k, options):
    """A of the columnwise maxima of |k|: an upper bound for each key and each summary."""
    return logit_size(q, abs(k).max(axis=-2, keepdims=True, initial=0), options)


def two_level_tolerance(q, k, v, options, eps):
    (m, d), b = k.shape[-2:], options["block"]
    b = max(1, min(b, m))
    A = two_level_size(q, k, options) + math.log(b)
    parts = -(-m // b)
    return eps * (2 * (d + b + 5) * A + 2 * b + parts + 9) * abs(v).max(initial=0)


def two_level_gradient_tolerance(q, k, v, dy, options, eps):
    """softmax_attention's with b more roundings of each summary, and log b more in a logit."""
    b = max(1, min(options["block"], k.shape[-2]))
    A = two_level_size(q, k, options)
    larger = (A + math.log(b)) / logit_size(q, k, options) * (1 + b)
    return larger * softmax_gradient_tolerance(q, k, v, dy, options, eps)


MECHANISMS = [
    Mechanism(
        "block_attention",
        definitions.block_attention,
        sees,
        {
            "concat": lambda s, rng: {"block": 3},
            "concat-scale": lambda s, rng: {"block": 2, "scale": -0.4},
            "concat-wide": lambda s, rng: {"block": s.n + 1, "fuse": "concat"},
            "sum": fused("sum"),
            "mean": fused("mean"),
            "max": fused("max"),
            "weighted": weighted,
            "mean-whole": lambda s, rng: {"block": max(1, s.n), "fuse": "mean"},
            "exact": lambda s, rng: {"block": 3, "fuse": "exact"},
            "exact-scale": lambda s, rng: {"block": 4, "fuse": "exact", "scale": 0.9},
            "exact-one": lambda s, rng: {"block": 1, "fuse": "exact"},
            "exact-wide": lambda s, rng: {"block": s.m + 2, "fuse": "exact"},
        },
        takes=lambda label, s: s.n == s.m or label.startswith("exact"),
        signed=("weighted",),
        nonlinear=("max",),
        arrays=("weights",),
        cost_sizes=sizes,
        tolerance=growth,
        gradient_tolerance=gradient_tolerance,
    ),
    Mechanism(
        "two_level_attention",
        definitions.two_level_attention,
        lambda i, j, shape, options: True,
        {
            "2": lambda s, rng: {"block": 2},
            "3-scale": lambda s, rng: {"block": 3, "scale": -0.8},
            "max": lambda s, rng: {"block": 3, "pool": "max"},
            "one": lambda s, rng: {"block": 1},
            "wide": lambda s, rng: {"block": s.n + 1},
            "wide-max": lambda s, rng: {"block": s.n + 1, "pool": "max"},
            "root": lambda s, rng: {"block": max(1, math.isqrt(s.n)), "pool": "mean"},
        },
        takes=lambda label, s: s.n == s.m,
        nonlinear=("max",),
        tolerance=two_level_tolerance,
        gradient_tolerance=two_level_gradient_tolerance,
    ),
]
