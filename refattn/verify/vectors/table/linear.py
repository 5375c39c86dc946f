"""Vectors of linear attention: full, causal, by chunks, by steps.

The compiled kernels cut positions at 64 and, causal, at 32, features at 128, and long sequences
into segments of about 512.
"""

import numpy as np

from refattn.linear.feature_maps import feature_map_of
from refattn.verify.vectors.entry import WIDE_DTYPES, Entry, Sizes, empties, heads_of

MAPS = ("elu", "relu", "softmax", "taylor")
STATE = {"return_state": True}


def options(**fixed):
    """Options; a callable among them is made for the sizes."""

    def make(s, draws):
        made = {}
        for name, x in fixed.items():
            made[name] = x(s, draws, made) if callable(x) else x
        return made

    return make


def key_mask(s, draws, made):
    """Some keys hidden, the first and the last among them."""
    seen = draws.coins((s.m,), 0.6)
    seen[[0, -1]] = False
    return seen


def none_seen(s, draws, made):
    return np.zeros(s.m, bool)


def mask_of_heads(s, draws, made):
    return draws.coins((*s.lead[1], s.m), 0.6)


def state(s, draws, made, lead=()):
    """Sums over keys that came before, of the size that keys make them."""
    r = feature_map_of(made.get("feature_map", "elu")).width(s.d)
    return draws.normal((*lead, r, s.e)), draws.uniform((*lead, r), 0.5, 2.0)


def state_without_weight(s, draws, made):
    """S alone: with no key seen, denominators are 0 and numerators are not."""
    S, z = state(s, draws, made)
    return S, 0.0 * z


def state_of_heads(s, draws, made):
    return state(s, draws, made, s.heads[:1] + (1,) * len(s.heads[1:]))


def faint(inputs, opts, s, draws):
    """elu + 1 is exp there: features of 1e-13, which an epsilon buries."""
    inputs["k"] -= 30.0


def fainter(inputs, opts, s, draws):
    """Features of 1e-35: the least that float32 holds with all its digits are 1e-38."""
    inputs["k"] -= 80.0


def far_negative(inputs, opts, s, draws):
    """relu leaves nothing of some queries: their denominators are 0."""
    inputs["q"][..., ::3, :] = -1.0 - abs(inputs["q"][..., ::3, :])


def bounds(inputs, opts, s, draws):
    """Zeros of both signs, where elu and relu have their corner."""
    inputs["q"][..., ::2, 0], inputs["k"][..., ::2, 0] = 0.0, -0.0


def with_nan(inputs, opts, s, draws):
    """NaN in the keys that the mask hides."""
    gone = ~opts["key_mask"]
    inputs["k"][..., gone, :], inputs["v"][..., gone, :] = np.nan, np.inf


def cancelling(inputs, opts, s, draws):
    inputs["v"] = 1000.0 * np.where(np.arange(s.m) % 2 == 0, 1.0, -1.0)[:, None] + inputs["v"]


def shared(name, more):
    """Entries of both forms that the two functions have."""
    full, past = {"causal": False}, {"causal": True}
    weightless = {"key_mask": none_seen, "initial_state": state_without_weight}

    def of(label, sizes, opts, change=None, **rest):
        return Entry(name, label, Sizes(*sizes), options(**(more | opts)), change, **rest)

    # Chunks or not: the kernels' segments are the same, so one of the two has them in float64.
    once = WIDE_DTYPES if name == "linear_attention" else ("float32",)
    found = [of("defaults", (9, 9, 5, 4), {}, small=True)]
    for kind in MAPS:
        found.append(of(f"{kind}", (9, 12, 5, 4), full | STATE | {"feature_map": kind}))
        found.append(
            of(f"{kind}, key mask, unnormalised, state", (12, 9, 4, 3),
               full | STATE | {"feature_map": kind, "normalize": False, "key_mask": key_mask,
                               "initial_state": state}, pulled=True)
        )  # fmt: skip
        if kind != "softmax":
            found.append(
                of(f"causal, {kind}", (11, 11, 4, 3), past | STATE | {"feature_map": kind})
            )
            found.append(
                of(f"causal, {kind}, key mask, unnormalised, state", (11, 11, 4, 3),
                   past | STATE | {"feature_map": kind, "normalize": False,
                                   "key_mask": key_mask, "initial_state": state}, pulled=True)
            )  # fmt: skip
    found += empties(of, full | STATE)
    return found + [
        of("one token", (1, 1, 4, 3), past | STATE, pulled=True),
        of("one query", (1, 33, 4, 3), full | STATE),
        of("one key", (9, 1, 4, 3), full | STATE, pulled=True),
        of("more keys", (7, 12, 4, 4), full),
        of("fewer keys", (12, 7, 4, 4), full),
        of("y alone, state", (9, 12, 4, 3), full | {"initial_state": state}),
        of("causal, state", (11, 11, 4, 3), past | STATE | {"initial_state": state}, small=True),
        of("causal, state pulled", (11, 11, 4, 3), past | STATE | {"initial_state": state},
           pulled=True),
        of("key mask", (9, 12, 4, 3), full | STATE | {"key_mask": key_mask}, pulled=True),
        of("causal, key mask", (12, 12, 4, 3), past | STATE | {"key_mask": key_mask}, pulled=True),
        of("no key seen", (5, 6, 4, 3), full | STATE | {"key_mask": none_seen}, pulled=True),
        of("NaN in hidden keys", (9, 12, 4, 3), full | STATE | {"key_mask": key_mask}, with_nan),
        of("causal, NaN in hidden keys", (12, 12, 4, 3), past | {"key_mask": key_mask}, with_nan),
        of("softmax, NaN in hidden keys", (9, 12, 4, 3),
           full | {"feature_map": "softmax", "key_mask": key_mask}, with_nan),
        of("zero denominators", (10, 9, 3, 4), full | {"feature_map": "relu"}, far_negative),
        of("causal, zero denominators", (10, 10, 3, 4), past | {"feature_map": "relu"},
           far_negative),
        of("corners of elu", (8, 9, 3, 4), full, bounds),
        of("corners of relu", (8, 9, 3, 4), full | {"feature_map": "relu"}, bounds),
        of("faint keys", (13, 13, 5, 7), full, faint),
        of("causal, faint keys", (13, 13, 5, 7), past, faint),
        of("fainter keys", (13, 13, 5, 7), full, fainter, gradients=False),
        of("cancelling values", (12, 16, 4, 4), full | STATE, cancelling),
        of("causal, cancelling values", (16, 16, 4, 4), past | STATE, cancelling),
        of("grouped heads", (6, 7, 4, 3, heads_of(groups=3)),
           full | STATE | {"initial_state": state_of_heads, "key_mask": mask_of_heads},
           pulled=True),
        of("softmax, grouped heads", (6, 7, 4, 3, heads_of()),
           full | STATE | {"feature_map": "softmax", "key_mask": mask_of_heads}),
        of("taylor, grouped heads", (6, 6, 3, 2, heads_of()),
           past | STATE | {"feature_map": "taylor", "initial_state": state_of_heads}),
        of("causal, nothing", (0, 0, 3, 2, heads_of()), past | STATE, dtypes=WIDE_DTYPES),
        of("values without weight", (5, 6, 3, 2), full | STATE | weightless),
        of("causal, values without weight", (6, 6, 3, 2), past | STATE | weightless),
        of("causal, grouped heads", (7, 7, 4, 3, heads_of()),
           past | STATE | {"initial_state": state_of_heads}, pulled=True),
        of("more than one tile", (130, 140, 3, 2), full | STATE, pulled=True),
        of("causal, more than one tile", (130, 130, 3, 2), past | STATE, pulled=True),
        of("causal, key mask, tiles", (100, 100, 3, 2),
           past | STATE | {"key_mask": key_mask, "initial_state": state},
           dtypes=WIDE_DTYPES, pulled=True),
        of("many features", (11, 13, 130, 3), full | STATE, dtypes=WIDE_DTYPES, pulled=True),
        of("causal, many features", (9, 9, 15, 2), past | STATE | {"feature_map": "taylor"},
           dtypes=WIDE_DTYPES, pulled=True),
        of("segments", (780, 800, 2, 2), full | STATE, dtypes=once, pulled=True),
        of("causal, segments", (780, 780, 2, 2), past | STATE | {"initial_state": state},
           dtypes=once, pulled=True),
    ]  # fmt: skip


def chunked(label, sizes, opts, change=None, **more):
    return Entry("linear_attention_chunked", label, Sizes(*sizes), options(**opts), change, **more)


def step(label, sizes, opts, **more):
    return Entry("linear_attention_step", label, Sizes(*sizes), options(**opts), **more)


ENTRIES = shared("linear_attention", {})
ENTRIES += shared("linear_attention_chunked", {"chunk": 5})
ENTRIES += [
    chunked("chunks of one", (9, 9, 4, 3), STATE | {"chunk": 1}),
    chunked("one chunk", (9, 9, 4, 3), STATE | {"chunk": 9}),
    chunked("a longer chunk", (9, 9, 4, 3), STATE | {"chunk": 64, "initial_state": state}),
    chunked("the default chunk", (130, 130, 3, 2), STATE, dtypes=WIDE_DTYPES),
]
ONE = (1, 1, 4, 3)
ENTRIES += [
    step("the first", ONE, {}, small=True),
    *(step(f"{kind}, state", ONE, {"feature_map": kind, "initial_state": state},
           small=kind == "elu") for kind in MAPS if kind != "softmax"),
    step("unnormalised", ONE, {"normalize": False, "initial_state": state}),
    step("heads", (1, 1, 4, 3, ((2, 3),) * 3), {"initial_state": state_of_heads}),
]  # fmt: skip
