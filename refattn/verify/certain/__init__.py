"""Attention with certainty: answers in float64, each number with a bound on its own error."""

from refattn.verify.certain.certified import truth, truth_vjp
from refattn.verify.certain.parts import answers

__all__ = ["answers", "truth", "truth_vjp"]
