"""The block hierarchy (12.3.3): attention in blocks, fused; and blocks that see summaries."""

from refattn.hierarchy.formula import (
    block_attention,
    block_attention_cost,
    block_attention_vjp,
)
from refattn.hierarchy.two_level import (
    two_level_attention,
    two_level_attention_cost,
    two_level_attention_vjp,
)

__all__ = [
    "block_attention",
    "block_attention_cost",
    "block_attention_vjp",
    "two_level_attention",
    "two_level_attention_cost",
    "two_level_attention_vjp",
]
