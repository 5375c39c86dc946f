"""Softmax attention: exact, O(n m). The formula, and the steps that lead to FlashAttention."""

from refattn.softmax.formula import (
    merge_attention,
    softmax_attention,
    softmax_attention_cost,
    softmax_attention_vjp,
)

__all__ = [
    "merge_attention",
    "softmax_attention",
    "softmax_attention_cost",
    "softmax_attention_vjp",
]
