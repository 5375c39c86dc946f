"""Vectors that random mutants of kernels and formulas showed to be missing (docs/mutants.md)."""

import numpy as np

import refattn
from refattn import masks
from refattn.verify.vectors.entry import WIDE_DTYPES, Entry, Sizes

NARROW = ("float32",)

PAST = {"causal": True}
APART = ((2, 3), (2, 1), (1, 3))  # a head's keys and its values have different numbers


def omega(count, **more):
    return lambda s, draws: {"omega": draws.normal((count, s.d)), **more}


def every_entry_gated(s, draws):
    """A gate of all entries, as many as queries; two rows are closed, no column is."""
    gate = draws.normal((s.n, s.e))
    gate[[0, 3]] = 0.0
    return {"gate": gate}


def half_closed(s, draws):
    gate = draws.normal((s.n, 1))
    gate[::2] = 0.0
    return gate


def masks_of_heads_under_one_gate(s, draws):
    return {"gate": half_closed(s, draws), "mask": draws.coins((*s.heads, s.n, s.m), 0.7)}


def gated_performer(s, draws):
    inner = {"attention": refattn.performer_attention, **PAST}
    return {"gate": half_closed(s, draws), "omega": draws.normal((6, s.d)), **inner}


def falling_keys(inputs, options, s, draws):
    """Features of later keys are larger by hundreds of powers of ten."""
    inputs["k"] *= np.linspace(60.0, 0.1, s.m)[:, None]


def nan_in_closed_rows(inputs, options, s, draws):
    inputs["q"][..., [0, 3], :] = np.nan


def two_faint_columns(inputs, options, s, draws):
    inputs["q"][..., [5, 128]] = inputs["k"][..., [5, 128]] = -90.0


def tenth(inputs, options, s, draws):
    inputs["q"] *= 0.1
    inputs["k"] *= 0.1


def nan_key(inputs, options, s, draws):
    inputs["k"][..., 1, :] = inputs["v"][..., 1, :] = np.nan


def apart(mechanism, label, options, n=6):
    return Entry(
        mechanism, f"{label}heads apart", Sizes(n, n, 4, 3, APART), options, dtypes=WIDE_DTYPES
    )


def wide(mechanism, label, sizes, options, change=None):
    return Entry(mechanism, label, Sizes(*sizes), options, change, dtypes=NARROW)


LINEAR, PERFORMER = "linear_attention", "performer_attention"
ENTRIES = [
    apart("softmax_attention", "", {}),
    apart("local_attention", "", {"window": 1}),
    apart("sparse_attention", "", lambda s, draws: {"mask": masks.hierarchical(s.n, 2)}),
    apart(LINEAR, "", {}),
    apart(LINEAR, "causal, ", PAST),
    apart("linear_attention_chunked", "", {"chunk": 4}),
    apart(PERFORMER, "", omega(5)),
    apart(PERFORMER, "causal, ", omega(5, **PAST)),
    apart("linformer_attention", "", lambda s, draws: {"E": draws.normal((3, s.m)) / 2}),
    apart("block_attention", "", {"block": 2, "fuse": "exact"}),
    apart("two_level_attention", "", {"block": 2}),
    Entry(
        "gated_attention",
        "every entry, square",
        Sizes(7, 9, 4, 7),
        every_entry_gated,
        nan_in_closed_rows,
    ),
    Entry(
        "gated_attention",
        "masks of heads under one gate",
        Sizes(7, 9, 4, 3, ((3,), (3,), (3,))),
        masks_of_heads_under_one_gate,
    ),
    wide("gated_attention", "performer, falling keys", (9, 9, 4, 3), gated_performer, falling_keys),
    wide(LINEAR, "two faint columns", (9, 12, 133, 3), {}, two_faint_columns),
    wide(LINEAR, "128 features", (20, 23, 128, 3), {}),
    wide(LINEAR, "causal, 128 features", (20, 20, 128, 3), PAST),
    wide(PERFORMER, "128 features", (20, 23, 3, 3), omega(128)),
    wide(PERFORMER, "causal, 128 features", (20, 20, 3, 3), omega(128, **PAST)),
    wide(PERFORMER, "many columns", (64, 64, 130, 2), omega(6), tenth),
    wide(
        "sparse_attention",
        "many heads, NaN in a hidden key",
        (2, 2, 1, 1, ((1025,), (1,), (1,))),
        lambda s, draws: {"mask": masks.intersection(masks.causal(2), _first_key())},
        nan_key,
    ),
]


def _first_key():
    from scipy.sparse import csr_array

    return csr_array(np.array([[True, False], [True, False]]))
