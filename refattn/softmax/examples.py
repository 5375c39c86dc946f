"""Softmax attention for the tables: the exact answer that all others are held against."""

from refattn.examples import Example
from refattn.softmax import softmax_attention, softmax_attention_cost

CHAPTER = "12.3"


def examples(n, d):
    """Softmax attention as it is."""
    return [Example("softmax", softmax_attention, softmax_attention_cost)]
