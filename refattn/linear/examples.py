"""Linear attention for the tables."""

from refattn.examples import Example
from refattn.linear import FEATURE_MAPS, linear_attention, linear_attention_cost

CHAPTER = "12.3.2"


def examples(n, d):
    """Every named feature map."""
    return [
        Example(f"linear, {name}", linear_attention, linear_attention_cost, o, o)
        for name in FEATURE_MAPS
        for o in [{"feature_map": name}]
    ]
