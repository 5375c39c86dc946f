"""Inputs and options of every mechanism, past one tile, with leading axes that broadcast."""

from typing import NamedTuple

import numpy as np
import scipy

import refattn

N, M, D, C = 70, 90, 8, 6  # queries, keys, columns of q and k, columns of v
LEAD = (2, 3)
DIFFERENTIABLE = ("bias", "E", "F", "gate", "weights", "initial_state")  # signature order
BARE = refattn.linear.FeatureMap(
    refattn.linear.identity,
    np.exp,
    refattn.linear.identity_vjp,
    lambda dphi, k: dphi * np.exp(k),
)


class Situation(NamedTuple):
    mechanism: str
    arrays: dict  # q, k, v and the options with a gradient, float32 values in float64
    options: dict  # all else
    pulls: dict  # cotangents of the outputs: y, lse, S, z

    @property
    def attention(self):
        return getattr(refattn, self.mechanism)

    @property
    def vjp(self):
        return getattr(refattn, f"{self.mechanism}_vjp")


def mask(rng, *lead):
    """Every kind of row, one with nothing to attend among them."""
    seen = rng.random((*lead, N, M)) < 0.4
    seen[..., 2, :] = False
    return seen


def bias(rng, *lead, hidden=0.0):
    x = rng.standard_normal((*lead, N, M))
    return np.where(rng.random(x.shape) < hidden, -np.inf, x)


def key_mask(rng, m, *lead):
    seen = rng.random((*lead, m)) < 0.6
    seen[..., 0] = True  # no causal row without a key
    return seen


def state(rng):
    return rng.standard_normal((3, D, C)), 1 + rng.random((2, 1, D))


def gate(rng, columns, closed=0.3):
    x = rng.standard_normal((3, N, columns))
    return np.where(rng.random((3, N, 1)) < closed, 0, x)


def pairs(rng):
    return scipy.sparse.csr_array(mask(rng))


def omega(rng):
    return refattn.random_features(6, D, rng=rng)


SOFTMAX, LOCAL, SPARSE = "softmax_attention", "local_attention", "sparse_attention"
LINEAR, CHUNKED = "linear_attention", "linear_attention_chunked"
PERFORMER, LINFORMER = "performer_attention", "linformer_attention"
BLOCKS, TWO, GATED = "block_attention", "two_level_attention", "gated_attention"

# label: (mechanism, whether n = m, rng -> options)
TABLE = {
    "full": (SOFTMAX, False, lambda rng: {}),
    "scale": (SOFTMAX, False, lambda rng: {"scale": -0.3}),
    "causal": (SOFTMAX, False, lambda rng: {"causal": True}),
    "softcap": (SOFTMAX, False, lambda rng: {"softcap": 1.5}),
    "a mask for each batch": (SOFTMAX, False, lambda rng: {"mask": mask(rng, 2, 1)}),
    "a bias for each head": (SOFTMAX, False, lambda rng: {"bias": bias(rng, 3)}),
    "bias of -inf": (SOFTMAX, False, lambda rng: {"bias": bias(rng, hidden=0.3)}),
    "everything": (
        SOFTMAX,
        False,
        lambda rng: {
            "mask": mask(rng, 3),
            "bias": bias(rng, 2, 1),
            "causal": True,
            "scale": 0.5,
            "softcap": 2.0,
        },
    ),
    "window": (LOCAL, False, lambda rng: {"window": 9}),
    "causal window": (LOCAL, False, lambda rng: {"window": (20, 5), "causal": True}),
    "dilated window": (LOCAL, False, lambda rng: {"window": (3, 1), "dilation": 7, "scale": 0.7}),
    "random pairs": (SPARSE, False, lambda rng: {"mask": pairs(rng)}),
    "hierarchical": (SPARSE, True, lambda rng: {"mask": refattn.masks.hierarchical(N, 5)}),
    "elu": (LINEAR, False, lambda rng: {}),
    "relu": (LINEAR, False, lambda rng: {"feature_map": "relu"}),
    "softmax": (LINEAR, False, lambda rng: {"feature_map": "softmax"}),
    "taylor": (LINEAR, False, lambda rng: {"feature_map": "taylor"}),
    "Q f(K)": (LINEAR, False, lambda rng: {"feature_map": BARE, "normalize": False}),
    "softmax, key mask": (
        LINEAR,
        False,
        lambda rng: {"feature_map": "softmax", "key_mask": key_mask(rng, M, 2, 1)},
    ),
    "state": (LINEAR, False, lambda rng: {"initial_state": state(rng)}),
    "elu, causal": (LINEAR, True, lambda rng: {"causal": True}),
    "relu, causal": (LINEAR, True, lambda rng: {"causal": True, "feature_map": "relu"}),
    "taylor, causal": (LINEAR, True, lambda rng: {"causal": True, "feature_map": "taylor"}),
    "state, causal, key mask": (
        LINEAR,
        True,
        lambda rng: {
            "causal": True,
            "initial_state": state(rng),
            "key_mask": key_mask(rng, N, 3),
        },
    ),
    "not normalised, causal": (LINEAR, True, lambda rng: {"causal": True, "normalize": False}),
    "chunks of 16": (CHUNKED, True, lambda rng: {"chunk": 16, "initial_state": state(rng)}),
    "chunks, not causal": (CHUNKED, False, lambda rng: {"causal": False, "chunk": 64}),
    **{
        f"{kind}{', causal' * causal}": (
            PERFORMER,
            causal,
            lambda rng, kind=kind, causal=causal: {
                "omega": omega(rng),
                "kind": kind,
                "causal": causal,
                "scale": 0.1 if kind == "trig" else None,  # where its signs cancel little
            },
        )
        for kind in ("positive", "trig", "hyperbolic")
        for causal in (False, True)
    },
    "positive, key mask": (
        PERFORMER,
        False,
        lambda rng: {"omega": omega(rng), "key_mask": key_mask(rng, M, 3), "scale": 0.2},
    ),
    "E": (LINFORMER, False, lambda rng: {"E": rng.standard_normal((9, M)) / 8}),
    "E and F for each head": (
        LINFORMER,
        False,
        lambda rng: {
            "E": rng.standard_normal((3, 9, M)) / 8,
            "F": rng.standard_normal((2, 1, 9, M)) / 8,
            "key_mask": key_mask(rng, M, 2, 1),
        },
    ),
    **{
        fuse: (BLOCKS, True, lambda rng, fuse=fuse: {"block": 10, "fuse": fuse})
        for fuse in ("sum", "mean", "max")
    },
    "concat, short last block": (BLOCKS, True, lambda rng: {"block": 24}),
    "exact": (BLOCKS, False, lambda rng: {"block": 32, "fuse": "exact"}),
    "weighted": (
        BLOCKS,
        True,
        lambda rng: {"block": 10, "fuse": "weighted", "weights": rng.standard_normal((2, 1, 7))},
    ),
    "mean pool": (TWO, True, lambda rng: {"block": 16}),
    "max pool": (TWO, True, lambda rng: {"block": 12, "pool": "max", "scale": 0.5}),
    "a gate a column": (GATED, False, lambda rng: {"gate": gate(rng, C)}),
    "rows open, causal": (GATED, False, lambda rng: {"gate": gate(rng, 1, 0.7), "causal": True}),
    "rows open, bias": (GATED, False, lambda rng: {"gate": gate(rng, 1, 0.7), "bias": bias(rng)}),
    "rows open, window": (
        GATED,
        False,
        lambda rng: {"gate": gate(rng, 1, 0.7), "attention": LOCAL, "window": 9},
    ),
    "rows open, linear": (
        GATED,
        True,
        lambda rng: {"gate": gate(rng, 1, 0.7), "attention": LINEAR, "causal": True},
    ),
}
LABELS = [f"{mechanism} {label}" for label, (mechanism, *_) in TABLE.items()]


def situation(label):
    """What stands under a label of LABELS; the same on every call."""
    mechanism, _, name = label.partition(" ")
    _, square, make = TABLE[name]
    rng = np.random.default_rng(list(label.encode()))
    m = N if square else M
    arrays = {
        "q": rng.standard_normal((*LEAD, N, D)),
        "k": rng.standard_normal((3, m, D)),
        "v": rng.standard_normal((2, 1, m, C)),
    }
    options = make(rng)
    for name in DIFFERENTIABLE:
        if name in options:
            arrays[name] = options.pop(name)
    rows = options["block"] if options.get("fuse") in ("sum", "mean", "max", "weighted") else N
    pulls = {"y": rng.standard_normal((*LEAD, rows, C))}
    if mechanism == SOFTMAX:
        pulls["lse"] = rng.standard_normal((*LEAD, N))
    if mechanism in (LINEAR, CHUNKED) and options.get("feature_map") != "taylor":
        pulls["S"] = rng.standard_normal((*LEAD, D, C))
        pulls["z"] = rng.standard_normal((*LEAD, D))
    rounded = each(lambda x: x.astype(np.float32).astype(float), (arrays, options, pulls))
    return Situation(mechanism, *rounded)


def each(do, x):
    """``do`` of every real array inside dicts and tuples."""
    if isinstance(x, dict):
        return {name: each(do, part) for name, part in x.items()}
    if isinstance(x, tuple):
        return tuple(each(do, part) for part in x)
    return do(x) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x


def named(arrays):
    """A state's two arrays under names of their own."""
    flat = {name: x for name, x in arrays.items() if name != "initial_state"}
    if "initial_state" in arrays:
        flat |= dict(zip(("S0", "z0"), arrays["initial_state"], strict=True))
    return flat


def whole(flat):
    """The inverse of ``named``."""
    arrays = {name: x for name, x in flat.items() if name not in ("S0", "z0")}
    return arrays | ({"initial_state": (flat["S0"], flat["z0"])} if "S0" in flat else {})


def ours(at, dtype, backend="numpy"):
    """refattn's outputs and gradients, under the names of the parts."""
    arrays, options, pulls = each(lambda x: x.astype(dtype), (at.arrays, at.options, at.pulls))
    told = {**options, "backend": backend}
    if at.mechanism == GATED:
        told["attention"] = getattr(refattn, options.get("attention", SOFTMAX))
    q, k, v = (arrays.pop(name) for name in "qkv")
    told |= arrays
    asked, pulled = {}, {}
    if "lse" in pulls:
        asked["return_lse"] = True
    if "S" in pulls:
        asked["return_state"], pulled["dstate"] = True, (pulls["S"], pulls["z"])
    answers = at.attention(q, k, v, **told, **asked)
    found = dict(zip(("y", "lse"), answers if "lse" in pulls else (answers,), strict=False))
    if "S" in pulls:
        found = {"y": answers[0], "S": answers[1][0], "z": answers[1][1]}
    if "lse" in pulls:
        pulled["dlse"] = np.where(np.isfinite(found["lse"]), pulls["lse"], 0)
    grads = at.vjp(pulls["y"], q, k, v, **told, **pulled)
    inputs = ("q", "k", "v", *(name for name in DIFFERENTIABLE if name in arrays))
    grads = named(dict(zip(inputs, grads, strict=True)))
    return found | {f"d{name}": x for name, x in grads.items()}
