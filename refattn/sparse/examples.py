"""Local and sparse attention for the tables."""

import math

from refattn import masks
from refattn.examples import Example
from refattn.sparse import (
    local_attention,
    local_attention_cost,
    sparse_attention,
    sparse_attention_cost,
)

CHAPTER = "12.3.1"


def examples(n, d):
    """Windows of 16 and 64 each side, one with gaps, and the masks of the papers."""
    root = max(1, math.isqrt(n))
    blocks = -(-n // 16)
    patterns = {
        f"strided, {root}": masks.strided(n, root),
        f"fixed, {root}": masks.fixed(n, root),
        "hierarchical, b = 8": masks.hierarchical(n, 8),
        "longformer, 16 each side": masks.longformer(n, 16, [0]),
        "bigbird, blocks of 16": masks.bigbird(
            n, 16, global_blocks=min(2, blocks), random_blocks=min(3, blocks), rng=0
        ),
    }
    windows = {
        "local, 16 each side": {"window": 16},
        "local, 64 each side": {"window": 64},
        "local, 16 each side, every 4th": {"window": 16, "dilation": 4},
    }
    return [
        Example(label, local_attention, local_attention_cost, window, window)
        for label, window in windows.items()
    ] + [
        Example(label, sparse_attention, sparse_attention_cost, {"mask": m}, {"nnz": m.nnz})
        for label, m in patterns.items()
    ]
