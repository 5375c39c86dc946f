"""Performer for the tables."""

from refattn.examples import Example
from refattn.performer import performer_attention, performer_attention_cost, random_features

CHAPTER = "12.3.2"


def examples(n, d):
    """Each kind of features, with the same number of columns."""
    found = []
    for kind, rows in (("positive", 256), ("hyperbolic", 128), ("trig", 128)):
        omega = random_features(rows, d, rng=0)
        options, sizes = {"omega": omega, "kind": kind}, {"num_features": rows, "kind": kind}
        label = f"performer, {kind}, 256"
        found.append(Example(label, performer_attention, performer_attention_cost, options, sizes))
    return found
