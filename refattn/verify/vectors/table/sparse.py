"""Vectors of local attention and of attention by csr masks.

Windows are cut at 64 queries in the formula and at 32 by 96 in the kernel; csr masks at 64 queries,
where a column that 10 of them see is dense, and at 64 columns.
"""

import numpy as np
import scipy

from refattn import masks
from refattn.verify.vectors.entry import WIDE_DTYPES, Entry, Sizes, empties, heads_of
from refattn.verify.vectors.table.softmax import (
    close_at_ten_thousand,
    mask_with_gaps,
    ten_thousand,
    with_nan,
)

KEYS_OF_A_ROW = 3  # that a random mask draws


def csr(mask):
    return scipy.sparse.csr_array(mask)


def nobody_sees(columns):
    """NaN and infinities in keys that no window reaches."""

    def change(inputs, options, s, draws):
        inputs["k"][..., columns, :], inputs["v"][..., columns, :] = np.nan, np.inf

    return change


def large(inputs, options, s, draws):
    inputs["q"] *= 300.0


def local(label, sizes, options, change=None, **more):
    return Entry("local_attention", label, Sizes(*sizes), options, change, **more)


ENTRIES = [
    local("one token", (1, 1, 4, 3), {"window": 0}),
    local("itself alone", (9, 9, 4, 3), {"window": 0}),
    local("odd sizes", (13, 13, 5, 7), {"window": 2}, small=True),
    local("left and right", (13, 13, 4, 3), {"window": (1, 3), "scale": 0.9}),
    local("left alone", (13, 13, 4, 3), {"window": (3, 0)}),
    local("right alone", (13, 13, 4, 3), {"window": (0, 2), "scale": -0.5}),
    local("causal", (13, 13, 4, 3), {"window": (3, 2), "causal": True}),
    local("causal, as many columns", (9, 9, 4, 4), {"window": (2, 1), "causal": True}, small=True),
    local("more keys", (7, 12, 4, 4), {"window": (2, 1)}),
    local("fewer keys", (12, 7, 4, 4), {"window": (2, 1)}, small=True),
    local("causal, fewer keys", (12, 7, 4, 4), {"window": 3, "causal": True}),
    local("dilated", (14, 14, 4, 3), {"window": (2, 1), "dilation": 3}),
    local("dilated, more keys", (8, 15, 4, 3), {"window": (1, 2), "dilation": 2}),
    local("dilated, fewer keys", (15, 8, 4, 3), {"window": (1, 2), "dilation": 4}),
    local("dilated, causal", (14, 14, 4, 3), {"window": 2, "dilation": 2, "causal": True}),
    local("dilated beyond the ends", (7, 7, 4, 3), {"window": 1, "dilation": 20}),
    local("wider than all", (9, 11, 4, 3), {"window": 40}),
    local("one query", (1, 33, 4, 3), {"window": 5}),
    local("one key", (9, 1, 4, 3), {"window": 2}),
    local("NaN where no window is", (9, 14, 4, 3), {"window": (2, 1)}, nobody_sees([0, 1, 2])),
    local("NaN, causal", (9, 14, 4, 3), {"window": 2, "causal": True}, nobody_sees([0, 2])),
    local("large scores", (13, 13, 5, 4), {"window": 3}, large),
    local("logits of 1e4", (13, 13, 4, 4), {"window": 3}, ten_thousand),
    local("grouped heads", (9, 9, 4, 3, heads_of(groups=3)), {"window": (1, 2)}),
    local("more than one tile", (130, 130, 4, 5), {"window": (20, 7)}),
    local("causal, tiles", (140, 140, 3, 2), {"window": 65, "causal": True}, dtypes=WIDE_DTYPES),
    local("wide, tiles", (135, 150, 3, 2), {"window": (70, 60)}, dtypes=WIDE_DTYPES),
    local("fewer keys, tiles", (150, 75, 3, 2), {"window": (10, 5)}, dtypes=WIDE_DTYPES),
    local("dilated, tiles", (260, 260, 3, 2), {"window": (9, 4), "dilation": 2},
          dtypes=WIDE_DTYPES),
    local("nine heads, tiles", (140, 140, 1, 1, ((9,), (9,), (9,))), {"window": (3, 4)},
          dtypes=WIDE_DTYPES),
]  # fmt: skip

ENTRIES += empties(local, {"window": 2})


def by(make):
    """Options with the mask that ``make`` gives for n positions."""
    return lambda s, draws: {"mask": make(s.n)}


def gaps(s, draws):
    return {"mask": csr(mask_with_gaps((s.n, s.m), draws))}


def hidden(s, draws):
    mask = draws.coins((s.n, s.m), 0.7)
    mask[[1, 4]], mask[:, [0, 3, 7]] = False, False
    return {"mask": csr(mask)}


def bands(s, draws):
    """Dense columns in some bands of 64 and single pairs in others, and rows that see nothing."""
    mask = draws.coins((s.n, s.m), 0.02)
    mask[:, 10:20], mask[: s.n // 2, 100:170] = True, True
    mask[70], mask[[0, 65]] = True, False
    return {"mask": csr(mask)}


def sparse(label, sizes, options, change=None, **more):
    return Entry("sparse_attention", label, Sizes(*sizes), options, change, **more)


TWO = masks.union(masks.local(15, 1), masks.global_tokens(15, [0]))
BOTH = masks.intersection(masks.local(15, 4), masks.strided(15, 3))
MAKERS = {
    "local": lambda n: masks.local(n, (2, 1)),
    "local, causal": lambda n: masks.local(n, 3, causal=True),
    "dilated": lambda n: masks.dilated(n, 2, 3),
    "causal": masks.causal,
    "strided": lambda n: masks.strided(n, 3),
    "strided, causal": lambda n: masks.strided(n, 3, causal=True),
    "fixed": lambda n: masks.fixed(n, 4, summary=2),
    "fixed, causal": lambda n: masks.fixed(n, 4, causal=True),
    "global tokens": lambda n: masks.global_tokens(n, [1, 6]),
    "random": lambda n: masks.random(n, KEYS_OF_A_ROW, rng=0),
    "block diagonal": lambda n: masks.block_diagonal(n, 4),
    "block causal": lambda n: masks.block_causal(n, 4),
    "hierarchical": lambda n: masks.hierarchical(n, 3),
    "hierarchical, causal": lambda n: masks.hierarchical(n, 2, causal=True),
    "longformer": lambda n: masks.longformer(n, 1, [0, 7]),
    "bigbird": lambda n: masks.bigbird(n, 3, global_blocks=1, random_blocks=1, rng=0),
    "union": lambda n: TWO,
    "intersection": lambda n: BOTH,
}
SMALL = ("hierarchical",)
ENTRIES += [sparse(label, (15, 15, 4, 3), by(make), small=label in SMALL)
            for label, make in MAKERS.items()]  # fmt: skip
ENTRIES += [
    sparse("one token", (1, 1, 4, 3), by(masks.causal)),
    sparse("odd sizes", (13, 13, 5, 7), gaps),
    sparse("more keys", (7, 12, 4, 4), gaps),
    sparse("fewer keys", (12, 7, 4, 4), gaps, small=True),
    sparse("one query", (1, 33, 4, 3), gaps),
    sparse("one key", (9, 1, 4, 3), gaps),
    sparse("scale", (9, 11, 4, 3), lambda s, d: {**gaps(s, d), "scale": 1.3}),
    sparse("negative scale", (9, 11, 4, 3), lambda s, d: {**gaps(s, d), "scale": -0.4}),
    sparse("all pairs", (9, 11, 4, 3), lambda s, d: {"mask": csr(np.ones((s.n, s.m), bool))}),
    sparse("nothing to see", (5, 6, 4, 3), lambda s, d: {"mask": csr(np.zeros((s.n, s.m), bool))}),
    sparse("NaN in hidden keys and queries", (11, 12, 4, 3), hidden, with_nan),
    sparse("large scores", (13, 17, 5, 4), gaps, large),
    sparse("logits of 1e4", (13, 17, 4, 4), gaps, ten_thousand),
    sparse("close logits of 1e4", (13, 17, 4, 4), gaps, close_at_ten_thousand, gradients=False),
    sparse("grouped heads", (9, 9, 4, 3, heads_of(groups=3)), gaps),
    sparse("1025 pairs", (41, 25, 2, 2), lambda s, d: {"mask": csr(np.ones((s.n, s.m), bool))},
           dtypes=WIDE_DTYPES),
    sparse("dense columns", (40, 40, 4, 3), gaps),
    sparse("causal, tiles", (150, 150, 3, 4), by(masks.causal), dtypes=("float32",)),
    sparse("bands, tiles", (140, 200, 3, 2), bands, dtypes=WIDE_DTYPES),
    sparse("bands, large scores, tiles", (140, 200, 3, 2), bands, large, dtypes=WIDE_DTYPES),
    sparse("global tokens, tiles", (200, 200, 3, 2), by(lambda n: masks.longformer(n, 2, [70])),
           dtypes=WIDE_DTYPES),
    sparse("single pairs, tiles", (200, 200, 3, 2), by(lambda n: masks.random(n, 3, rng=1)),
           dtypes=WIDE_DTYPES),
    sparse("hierarchical, tiles", (256, 256, 2, 3), by(lambda n: masks.hierarchical(n, 4)),
           dtypes=("float32",)),
    sparse("nine heads, tiles", (70, 70, 1, 1, ((9,), (9,), (9,))), gaps, dtypes=WIDE_DTYPES),
]  # fmt: skip
ENTRIES += empties(sparse, lambda s, draws: {"mask": csr(np.zeros((s.n, s.m), bool))})
