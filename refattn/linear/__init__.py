"""Linear attention (12.3.2): the kernel factorisation Q f(K) V, in all its forms."""

from refattn.linear.chunked import (
    linear_attention_chunked,
    linear_attention_chunked_cost,
    linear_attention_chunked_vjp,
)
from refattn.linear.feature_maps import FEATURE_MAPS, FeatureMap, identity, identity_vjp
from refattn.linear.formula import (
    linear_attention,
    linear_attention_cost,
    linear_attention_step,
    linear_attention_vjp,
)

__all__ = [
    "FEATURE_MAPS",
    "FeatureMap",
    "identity",
    "identity_vjp",
    "linear_attention",
    "linear_attention_chunked",
    "linear_attention_chunked_cost",
    "linear_attention_chunked_vjp",
    "linear_attention_cost",
    "linear_attention_step",
    "linear_attention_vjp",
]
