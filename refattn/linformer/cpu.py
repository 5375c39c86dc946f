"""Linformer on the CPU: two products, and softmax attention on what they leave of the keys."""

from refattn.dispatch import composed
from refattn.linformer import formula

linformer_attention = composed(formula.linformer_attention, "numba")
linformer_attention_vjp = composed(formula.linformer_attention_vjp, "numba")
