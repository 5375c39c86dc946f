"""Linformer for the tables: projections that need no training."""

from refattn.examples import Example
from refattn.linformer import linformer_attention, linformer_attention_cost, projections

CHAPTER = "12.3.2"


def examples(n, d):
    """The means of up to 64 segments, and as many random mixtures."""
    r = min(n, 64)
    matrices = {
        f"linformer, {r} means": projections.mean_pool(r, n),
        f"linformer, {r} gaussian": projections.gaussian(r, n, rng=0),
    }
    return [
        Example(label, linformer_attention, linformer_attention_cost, {"E": E}, {"r": r})
        for label, E in matrices.items()
    ]
