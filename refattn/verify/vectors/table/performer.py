"""Vectors of Performer. Its kernels are those of linear attention: 64 and 32 positions, 128
features, segments of about 512; exponents that rise too fast cut a causal chunk."""

import numpy as np

from refattn.verify.vectors.entry import WIDE_DTYPES, Entry, Sizes, empties, heads_of
from refattn.verify.vectors.table.linear import key_mask, mask_of_heads, none_seen, options

KINDS = ("positive", "trig", "hyperbolic")
FAR, VERY_FAR = 6.0, 30.0
FALLING = 24.0  # exponents from -400 to 0: a chunk is cut in both precisions


def directions(count):
    return lambda s, draws, made: draws.normal((count, s.d))


def near(inputs, opts, s, draws):
    """Short vectors, whose signed features do not cancel."""
    inputs["q"] *= 0.5
    inputs["k"] *= 0.5


def far(factor):
    """Keys of large norm: their features span many powers of ten."""

    def change(inputs, opts, s, draws):
        inputs["k"] *= factor

    return change


def falling(inputs, opts, s, draws):
    """Norms that fall along the keys, so that exponents rise by tens from key to key."""
    signs = np.where(inputs["k"] < 0, -1.0, 1.0)
    inputs["k"] = signs * (FALLING * np.arange(s.m, 0, -1) / s.m)[:, None]


def growing(inputs, opts, s, draws):
    inputs["k"] *= (FAR * np.arange(1, s.m + 1) / s.m)[:, None]


def with_nan(inputs, opts, s, draws):
    near(inputs, opts, s, draws)
    gone = ~opts["key_mask"]
    inputs["k"][..., gone, :], inputs["v"][..., gone, :] = np.nan, np.inf


def of(label, sizes, opts, change=near, count=24, **more):
    made = options(omega=directions(count), **opts)
    return Entry("performer_attention", label, Sizes(*sizes), made, change, **more)


PAST = {"causal": True}
ENTRIES = []
for kind in KINDS:
    fixed = {"kind": kind}
    ENTRIES += [
        of(f"{kind}", (9, 12, 4, 5), fixed, small=kind == "positive"),
        of(f"causal, {kind}", (13, 13, 4, 5), PAST | fixed, small=kind == "trig"),
        of(f"{kind}, key mask", (9, 12, 4, 3), fixed | {"key_mask": key_mask, "scale": 0.3}),
        of(f"causal, {kind}, key mask", (12, 12, 4, 3),
           PAST | fixed | {"key_mask": key_mask, "scale": 0.3}),
        of(f"{kind}, NaN in hidden keys", (9, 12, 4, 3), fixed | {"key_mask": key_mask}, with_nan),
        of(f"causal, {kind}, NaN in hidden keys", (12, 12, 4, 3),
           PAST | fixed | {"key_mask": key_mask}, with_nan),
        of(f"{kind}, more than one tile", (70, 135, 3, 2), fixed, dtypes=WIDE_DTYPES),
        of(f"causal, {kind}, more than one tile", (135, 135, 3, 2), PAST | fixed,
           dtypes=WIDE_DTYPES),
        of(f"{kind}, many features", (40, 45, 3, 2), fixed, count=133, dtypes=WIDE_DTYPES),
        of(f"causal, {kind}, many features", (40, 40, 3, 2), PAST | fixed, count=133,
           dtypes=WIDE_DTYPES),
        of(f"causal, {kind}, segments", (780, 780, 2, 2), PAST | fixed, count=6,
           dtypes=WIDE_DTYPES if kind == "positive" else ("float32",)),
    ]  # fmt: skip
for kind in ("positive", "hyperbolic"):  # far keys leave signed features nothing but what cancels
    fixed = {"kind": kind}
    ENTRIES += [
        of(f"{kind}, far keys", (13, 13, 4, 4), fixed, far(FAR)),
        of(f"causal, {kind}, far keys", (13, 13, 4, 4), PAST | fixed, far(FAR)),
        of(f"{kind}, very far keys", (13, 13, 4, 4), fixed, far(VERY_FAR)),
        of(f"causal, {kind}, very far keys", (13, 13, 4, 4), PAST | fixed, far(VERY_FAR)),
        of(f"causal, {kind}, falling norms", (36, 36, 2, 2), PAST | fixed, falling, count=8,
           dtypes=WIDE_DTYPES),
        of(f"causal, {kind}, growing norms", (70, 70, 3, 2), PAST | fixed, growing,
           dtypes=WIDE_DTYPES),
    ]  # fmt: skip
ENTRIES += [
    of("one token", (1, 1, 4, 3), PAST),
    of("one query", (1, 33, 4, 3), {}),
    of("one key", (9, 1, 4, 3), {}),
    of("fewer keys", (12, 7, 4, 4), {}),
    of("one feature", (7, 8, 4, 3), {}, count=1),
    of("scale", (9, 9, 4, 3), {"scale": 0.25}),
    of("causal, scale", (9, 9, 4, 3), PAST | {"scale": 1.2}),
    of("no key seen", (5, 6, 4, 3), {"key_mask": none_seen}),
    of("grouped heads", (6, 7, 4, 3, heads_of(groups=3)), {"key_mask": mask_of_heads}),
    of("causal, grouped heads", (7, 7, 4, 3, heads_of()), PAST | {"kind": "hyperbolic"}),
    of("trig, grouped heads", (6, 7, 4, 3, heads_of()), {"kind": "trig"}),
    of("segments", (800, 780, 2, 2), {}, count=6, dtypes=WIDE_DTYPES),
]
ENTRIES += empties(of, {})
