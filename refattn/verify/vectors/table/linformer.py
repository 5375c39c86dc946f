"""Vectors of Linformer, whose kernel multiplies 128 rows of E at a time."""

import numpy as np

from refattn.verify.vectors.entry import WIDE_DTYPES, Entry, Sizes, empties, heads_of
from refattn.verify.vectors.table.linear import key_mask, mask_of_heads, none_seen, options


def matrix(r, lead=()):
    return lambda s, draws, made: draws.normal((*lead, r, s.m)) / 2


def of(label, sizes, opts, change=None, **more):
    return Entry("linformer_attention", label, Sizes(*sizes), options(**opts), change, **more)


def with_nan(inputs, opts, s, draws):
    gone = ~opts["key_mask"]
    inputs["k"][..., gone, :], inputs["v"][..., gone, :] = np.nan, np.inf


def hidden_in_both(inputs, opts, s, draws):
    """NaN in the projections' columns of hidden keys too."""
    with_nan(inputs, opts, s, draws)
    gone = ~opts["key_mask"]
    opts["E"][..., gone], opts["F"][..., gone] = np.nan, -np.inf


def large(inputs, opts, s, draws):
    inputs["q"] *= 300.0


ENTRIES = [
    of("one token", (1, 1, 4, 3), {"E": matrix(1)}),
    of("odd sizes", (13, 13, 5, 7), {"E": matrix(3)}),
    of("two projections", (9, 12, 4, 3), {"E": matrix(4), "F": matrix(4)}, small=True),
    of("one row", (7, 9, 4, 3), {"E": matrix(1)}),
    of("more rows than keys", (9, 5, 4, 3), {"E": matrix(11), "scale": -0.6}),
    of("one query", (1, 33, 4, 3), {"E": matrix(4), "scale": 0.2}),
    of("one key", (9, 1, 4, 3), {"E": matrix(3), "F": matrix(3)}),
    of("key mask", (9, 12, 4, 3), {"E": matrix(4), "key_mask": key_mask}),
    of("two projections, key mask", (9, 12, 4, 3),
       {"E": matrix(4), "F": matrix(4), "key_mask": key_mask, "scale": 0.7}),
    of("no key seen", (5, 6, 4, 3), {"E": matrix(2), "key_mask": none_seen}),
    of("NaN in hidden keys", (9, 12, 4, 3), {"E": matrix(4), "key_mask": key_mask}, with_nan),
    of("NaN in hidden keys and columns", (9, 12, 4, 3),
       {"E": matrix(4), "F": matrix(4), "key_mask": key_mask}, hidden_in_both),
    of("large scores", (13, 17, 5, 4), {"E": matrix(4)}, large),
    of("grouped heads", (6, 7, 4, 3, heads_of(groups=3)),
       {"E": matrix(3, (2, 1)), "F": matrix(3), "key_mask": mask_of_heads}),
    of("a projection of each head", (6, 7, 4, 3, heads_of()), {"E": matrix(3, (2, 1, 1))}),
    of("more than one tile", (70, 80, 3, 2), {"E": matrix(70)},
       dtypes=WIDE_DTYPES),
    of("many rows", (30, 40, 3, 2), {"E": matrix(133)}, dtypes=WIDE_DTYPES),
]  # fmt: skip
ENTRIES += empties(of, {"E": matrix(2)})
