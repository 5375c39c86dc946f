"""Softmax attention: exact, O(n m). The formula, and the steps that lead to FlashAttention."""

from refattn.softmax.formula import (
    softmax_attention,
    softmax_attention_cost,
    softmax_attention_vjp,
)
from refattn.softmax.merge import merge_attention

__all__ = [
    "merge_attention",
    "softmax_attention",
    "softmax_attention_cost",
    "softmax_attention_vjp",
]
