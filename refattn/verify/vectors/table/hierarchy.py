"""Vectors of attention in blocks, and on two levels."""

from refattn.verify.vectors.entry import WIDE_DTYPES, Entry, Sizes, empties, heads_of
from refattn.verify.vectors.table.linear import options
from refattn.verify.vectors.table.softmax import ten_thousand


def weights(*lead):
    return lambda s, draws, made: draws.normal((*lead, s.n // made["block"]))


def large(inputs, opts, s, draws):
    inputs["q"] *= 300.0


def block(label, sizes, opts, change=None, **more):
    return Entry("block_attention", label, Sizes(*sizes), options(**opts), change, **more)


def fused(fuse, size, **more):
    return {"block": size, "fuse": fuse, **more}


CUT = ("sum", "mean", "max")  # fused position by position
HEADS = (6, 6, 4, 3, heads_of())
ENTRIES = [
    block("one token", (1, 1, 4, 3), fused("concat", 1)),
    block("concat by default", (13, 13, 5, 7), {"block": 4}, small=True),
    block("concat, a longer block", (9, 9, 4, 3), fused("concat", 20)),
    block("concat, scale", (9, 9, 4, 3), fused("concat", 3, scale=-0.4)),
    *(block(fuse, (12, 12, 4, 3), fused(fuse, 4), small=fuse == "max") for fuse in CUT),
    *(block(f"{fuse}, scale", (12, 12, 4, 3), fused(fuse, 3, scale=0.9)) for fuse in CUT),
    *(block(f"{fuse}, one block", (7, 7, 4, 3), fused(fuse, 7)) for fuse in CUT),
    *(block(f"{fuse}, grouped heads", HEADS, fused(fuse, 2)) for fuse in CUT),
    block("weighted", (12, 12, 4, 3), fused("weighted", 4, weights=weights())),
    block("weighted, scale", (12, 12, 4, 3), fused("weighted", 2, weights=weights(), scale=0.9)),
    block("weighted, grouped heads", HEADS, fused("weighted", 2, weights=weights(2, 2, 1))),
    block("weighted, one for all heads", HEADS, fused("weighted", 2, weights=weights())),
    block("exact, odd sizes", (13, 13, 5, 7), fused("exact", 4)),
    block("exact, more keys", (7, 12, 4, 4), fused("exact", 5)),
    block("exact, fewer keys", (12, 7, 4, 4), fused("exact", 3, scale=0.9)),
    block("exact, one query", (1, 33, 4, 3), fused("exact", 8)),
    block("exact, large scores", (13, 17, 5, 4), fused("exact", 4), large),
    block("exact, logits of 1e4", (13, 17, 4, 4), fused("exact", 4), ten_thousand),
    block("exact, grouped heads", (6, 7, 4, 3, heads_of(groups=3)), fused("exact", 3)),
    block("concat, grouped heads", (7, 7, 4, 3, heads_of(groups=3)), fused("concat", 3)),
    block("concat, tiles", (150, 150, 3, 2), fused("concat", 40), dtypes=WIDE_DTYPES),
    block("exact, tiles", (70, 150, 3, 2), fused("exact", 64), dtypes=WIDE_DTYPES),
    block("mean, tiles", (150, 150, 3, 2), fused("mean", 75), dtypes=WIDE_DTYPES),
]

ENTRIES += empties(block, fused("exact", 3))


def two(label, sizes, opts, change=None, **more):
    return Entry("two_level_attention", label, Sizes(*sizes), options(**opts), change, **more)


def ties(inputs, opts, s, draws):
    """Few different numbers, so that several keys of a block have its largest."""
    for name in ("k", "v"):
        inputs[name] = draws.whole(inputs[name].shape, 3) / 2.0


POOLS = ("mean", "max")
ENTRIES += [
    two("one token", (1, 1, 4, 3), {"block": 1}),
    two("mean by default", (13, 13, 5, 7), {"block": 4}, small=True),
    *(two(f"{pool}", (12, 12, 4, 3), {"block": 4, "pool": pool}, small=pool == "max")
      for pool in POOLS),
    *(two(f"{pool}, blocks of one", (7, 7, 4, 3), {"block": 1, "pool": pool}) for pool in POOLS),
    *(two(f"{pool}, one block", (7, 7, 4, 3), {"block": 9, "pool": pool}) for pool in POOLS),
    *(two(f"{pool}, short last block, scale", (11, 11, 4, 3),
          {"block": 3, "pool": pool, "scale": -0.6}) for pool in POOLS),
    *(two(f"{pool}, large scores", (13, 13, 5, 4), {"block": 4, "pool": pool}, large)
      for pool in POOLS),
    *(two(f"{pool}, grouped heads", (7, 7, 4, 3, heads_of(groups=3)), {"block": 3, "pool": pool})
      for pool in POOLS),
    *(two(f"{pool}, tiles", (150, 150, 3, 2), {"block": 40, "pool": pool}, dtypes=WIDE_DTYPES)
      for pool in POOLS),
    two("max, ties", (12, 12, 4, 3), {"block": 4, "pool": "max"}, ties),
    two("mean, many blocks, tiles", (140, 140, 3, 2), {"block": 2}, dtypes=WIDE_DTYPES),
]  # fmt: skip
ENTRIES += empties(two, {"block": 3}, square=True)
