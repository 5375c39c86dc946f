"""Gates on the CPU: the formula, with the open rows' attention compiled."""

from refattn.dispatch import composed
from refattn.gates import formula

gated_attention = composed(formula.gated_attention, "numba")
gated_attention_vjp = composed(formula.gated_attention_vjp, "numba")
