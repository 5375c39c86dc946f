"""Gated attention for the tables."""

import numpy as np

from refattn.examples import Example
from refattn.gates import gated_attention, gated_attention_cost, top_k

CHAPTER = "12.3.4"


def examples(n, d):
    """Half of the rows open, every other one: what a hard gate saves, not how well it chooses."""
    keep = (n + 1) // 2
    gate = top_k(np.where(np.arange(n) % 2 == 0, 1.0, 0.0), keep)
    options, sizes = {"gate": gate}, {"open_rows": keep}
    return [
        Example("gated, every other row", gated_attention, gated_attention_cost, options, sizes)
    ]
