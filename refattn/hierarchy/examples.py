"""The block hierarchy for the tables. Fused blocks have other shapes, and nothing to compare."""

import math

from refattn.examples import Example
from refattn.hierarchy import (
    block_attention,
    block_attention_cost,
    two_level_attention,
    two_level_attention_cost,
)

CHAPTER = "12.3.3"


def examples(n, d):
    """Blocks of about sqrt(n): alone, with summaries of the others, and merged exactly."""
    b = max(1, math.isqrt(n))
    settings = {
        f"blocks of {b}": {"block": b},
        f"blocks of {b}, merged exactly": {"block": b, "fuse": "exact"},
    }
    two_level = {
        f"two levels, blocks of {b}": {"block": b},
        f"two levels, blocks of {b}, maxima": {"block": b, "pool": "max"},
    }
    return [
        Example(label, block_attention, block_attention_cost, options, options)
        for label, options in settings.items()
    ] + [
        Example(label, two_level_attention, two_level_attention_cost, options, options)
        for label, options in two_level.items()
    ]
