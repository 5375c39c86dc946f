"""Sparse attention (12.3.1): local windows, and any pattern given as a csr mask. O(n k)."""

from refattn.sparse.formula import (
    local_attention,
    local_attention_cost,
    local_attention_vjp,
    sparse_attention,
    sparse_attention_cost,
    sparse_attention_vjp,
)

__all__ = [
    "local_attention",
    "local_attention_cost",
    "local_attention_vjp",
    "sparse_attention",
    "sparse_attention_cost",
    "sparse_attention_vjp",
]
