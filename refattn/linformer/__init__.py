"""Linformer (12.3.2): softmax attention on projected keys and values. O(n r)."""

from refattn.linformer import projections
from refattn.linformer.formula import (
    linformer_attention,
    linformer_attention_cost,
    linformer_attention_vjp,
)

__all__ = [
    "linformer_attention",
    "linformer_attention_cost",
    "linformer_attention_vjp",
    "projections",
]
