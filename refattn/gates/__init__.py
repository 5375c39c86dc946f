"""Gates (12.3.4): G(Q, K, V) decides what is kept, and what is not computed at all."""

from refattn.gates.formula import gated_attention, gated_attention_cost, gated_attention_vjp
from refattn.gates.functions import block_top_k, sigmoid, sigmoid_vjp, threshold, top_k

__all__ = [
    "block_top_k",
    "gated_attention",
    "gated_attention_cost",
    "gated_attention_vjp",
    "sigmoid",
    "sigmoid_vjp",
    "threshold",
    "top_k",
]
