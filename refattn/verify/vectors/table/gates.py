"""Vectors of gated attention: each kind of gate around each attention."""

import numpy as np

from refattn import masks
from refattn.verify.vectors.entry import WIDE_DTYPES, Entry, Sizes, attention_of, empties, heads_of
from refattn.verify.vectors.table.linear import key_mask, options, state, state_of_heads
from refattn.verify.vectors.table.linear import mask_of_heads as keys_of_heads
from refattn.verify.vectors.table.performer import falling
from refattn.verify.vectors.table.softmax import bias_with_gaps, mask_with_gaps


def soft(s, draws, made):
    """A number above 0 for each row."""
    return draws.uniform((s.n, 1), 0.1, 1.1)


def columns(s, draws, made):
    """A number of either sign for each entry, some 0, some rows 0 altogether."""
    gate = draws.normal((s.n, s.e))
    gate[draws.coins((s.n, s.e), 0.4)] = 0.0
    gate[::5] = 0.0
    return gate


def hard(s, draws, made):
    """Zeros and ones."""
    return (np.arange(s.n)[:, None] % 3 != 1) * 1.0


def closed(s, draws, made):
    return np.zeros((s.n, 1))


def four_closed(s, draws, made):
    """A block of four, whole."""
    return ((np.arange(s.n)[:, None] < 4) | (np.arange(s.n)[:, None] > 7)) * 1.0


def last_closed(s, draws, made):
    return (np.arange(s.n)[:, None] < s.n // 2) * 1.0


def of_heads(s, draws, made):
    """Other rows are open in each head; in the first none."""
    gate = draws.coins((*s.heads, s.n, 1), 0.5) * 1.0
    gate[(0,) * len(s.heads)] = 0.0
    return gate


def one_for_all(s, draws, made):
    return np.full((1, 1), 0.5)


def of(label, sizes, opts, attention=None, change=None, **more):
    made = {"gate": hard, **opts}
    if attention is not None:
        made["attention"] = attention_of(attention)
    return Entry("gated_attention", label, Sizes(*sizes), _with(made), change, **more)


def _with(made):
    """Options; an attention is a function too, but none to be called here."""
    attention = {"attention": made.pop("attention")} if "attention" in made else {}
    inner = options(**made)
    return lambda s, draws: inner(s, draws) | attention


def mask(s, draws, made):
    return mask_with_gaps((s.n, s.m), draws)


def bias(s, draws, made):
    return bias_with_gaps((s.n, s.m), draws)


def bias_of_keys(s, draws, made):
    return draws.normal((s.m,))


def pairs(s, draws, made):
    return masks.hierarchical(s.n, 3)


def mask_of_heads(s, draws, made):
    return draws.coins((*s.heads[:2], 1, s.n, s.m), 0.7)


def bias_of_heads(s, draws, made):
    return draws.normal((s.heads[0], 1, 1, 1, s.m))


def matrices(s, draws, made):
    return draws.normal((s.heads[1], 1, 4, s.m)) / 2


def directions(s, draws, made):
    return draws.normal((12, s.d))


def matrix(s, draws, made):
    return draws.normal((4, s.m)) / 2


def near(inputs, opts, s, draws):
    inputs["q"] *= 0.5
    inputs["k"] *= 0.5


def closed_nan(inputs, opts, s, draws):
    """A closed query may hold anything."""
    inputs["q"][..., 1, :] = np.nan


ODD, CROSS = (11, 11, 4, 3), (7, 12, 4, 3)
PAST = {"causal": True}
INNER = {
    "local": ("local_attention", {"window": 2, **PAST}),
    "local, dilated": ("local_attention", {"window": (2, 1), "dilation": 2}),
    "sparse": ("sparse_attention", {"mask": pairs}),
    "linear": ("linear_attention", {}),
    "linear, causal": ("linear_attention", {**PAST, "key_mask": key_mask, "initial_state": state}),
    "chunked": ("linear_attention_chunked", {"chunk": 3, "initial_state": state}),
    "linformer": ("linformer_attention", {"E": matrix, "F": matrix}),
    "performer": ("performer_attention", {"omega": directions}),
    "performer, causal": ("performer_attention", {"omega": directions, **PAST}),
    "blocks": ("block_attention", {"block": 4}),
    "blocks, exact": ("block_attention", {"block": 4, "fuse": "exact"}),
    "two level": ("two_level_attention", {"block": 4}),
    "two level, max": ("two_level_attention", {"block": 3, "pool": "max"}),
}
ENTRIES = [
    of("one token", (1, 1, 4, 3), {"gate": soft}),
    of("soft", (7, 9, 5, 3), {"gate": soft}, small=True),
    of("columns", (12, 9, 4, 3), {"gate": columns}),
    of("hard", CROSS, {}),
    of("hard, causal", CROSS, PAST, small=True),
    of("hard, causal, fewer keys", (12, 7, 4, 3), PAST),
    of("all closed", CROSS, {"gate": closed}),
    of("one number", CROSS, {"gate": one_for_all}),
    of("hard, mask and bias", CROSS, {"mask": mask, "bias": bias, "scale": 0.7, "softcap": 2.0}),
    of("hard, bias of keys", CROSS, {"bias": bias_of_keys, **PAST}),
    of("soft, mask and bias", CROSS, {"gate": soft, "mask": mask, "bias": bias}),
    of("NaN in a closed query", CROSS, {}, change=closed_nan),
    of("gates of heads", (6, 7, 4, 3, heads_of()), {"gate": of_heads, **PAST}),
    of("gates of heads, bias", (6, 7, 4, 3, heads_of()), {"gate": of_heads, "bias": bias_of_keys}),
    of("one gate of all heads", (6, 7, 4, 3, heads_of()), {}),
    of("gates of heads, linear", (6, 6, 4, 3, heads_of()),
       {"gate": of_heads, "initial_state": state_of_heads, "key_mask": keys_of_heads, **PAST},
       "linear_attention"),
    of("gates of heads, linformer", (6, 7, 4, 3, heads_of()),
       {"gate": of_heads, "E": matrices, "F": matrix, "key_mask": keys_of_heads},
       "linformer_attention"),
    of("gates of heads, mask and bias of heads", (6, 7, 4, 3, heads_of()),
       {"gate": of_heads, "mask": mask_of_heads, "bias": bias_of_heads}),
    of("one gate, mask and bias of heads", (6, 7, 4, 3, heads_of()),
       {"mask": mask_of_heads, "bias": bias_of_heads}),
    of("one gate, linear of heads", (6, 7, 4, 3, heads_of()),
       {"initial_state": state_of_heads, "key_mask": keys_of_heads}, "linear_attention"),
    of("performer, causal, falling norms", (20, 20, 4, 3), {"omega": directions, **PAST},
       "performer_attention", falling),
    of("blocks, weighted", (12, 12, 4, 3), {
        "gate": lambda s, d, made: d.uniform((4, 1), 0.1, 1.1), "block": 4, "fuse": "weighted",
        "weights": lambda s, d, made: d.normal((3,))}, "block_attention"),
    *(of(f"{label}, hard", ODD, opts, name, near) for label, (name, opts) in INNER.items()),
    *(of(f"{label}, columns", ODD, {"gate": columns, **opts}, name, near)
      for label, (name, opts) in INNER.items()),
    of("linear, causal, last rows closed", ODD, {"gate": last_closed, **PAST}, "linear_attention"),
    of("performer, causal, last rows closed", ODD,
       {"gate": last_closed, "omega": directions, **PAST}, "performer_attention", near),
    of("two level, a block closed", ODD, {"gate": four_closed, "block": 4}, "two_level_attention"),
    of("blocks, a block closed", ODD, {"gate": four_closed, "block": 4}, "block_attention"),
    of("hard, tiles", (150, 140, 3, 2), PAST, dtypes=WIDE_DTYPES),
    of("local, tiles", (150, 150, 3, 2), {"window": (20, 5)}, "local_attention",
       dtypes=WIDE_DTYPES),
]  # fmt: skip
ENTRIES += empties(of, {"gate": soft})
