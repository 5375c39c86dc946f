"""Performer (12.3.2): softmax attention through random features, in linear time."""

from refattn.performer.features import (
    hyperbolic_features,
    kernel_variance,
    positive_features,
    random_features,
    trig_features,
)
from refattn.performer.formula import (
    performer_attention,
    performer_attention_cost,
    performer_attention_vjp,
)

__all__ = [
    "hyperbolic_features",
    "kernel_variance",
    "performer_attention",
    "performer_attention_cost",
    "performer_attention_vjp",
    "positive_features",
    "random_features",
    "trig_features",
]
