"""Vectors of softmax attention and of merged parts.

The compiled kernels cut queries at 64 (32 where spans are short and move), keys at 128 (96), and
the gradient's queries at 512: the long cases cross those edges.
"""

import numpy as np

from refattn.verify.vectors.entry import WIDE_DTYPES, Entry, Sizes, empties, heads_of

LSE = {"return_lse": True}
LOWEST = -30000.0  # a bias that is no -inf, and that float16 has


def mask_with_gaps(shape, draws, share=0.5):
    """A mask whose first and last rows are empty where there are more than two."""
    mask = draws.coins(shape, share)
    if shape[-2] > 2:
        mask[..., [0, -1], :] = False
    return mask


def bias_with_gaps(shape, draws):
    bias = draws.normal(shape)
    bias[draws.coins(shape, 0.3)] = -np.inf
    return bias


def masked(**more):
    return lambda s, draws: {"mask": mask_with_gaps((s.n, s.m), draws), **LSE, **more}


def biased(make=bias_with_gaps, shape=lambda s: (s.n, s.m), **more):
    return lambda s, draws: {"bias": make(shape(s), draws), **LSE, **more}


def normal(shape, draws):
    return draws.normal(shape)


def everything(s, draws):
    options = masked(causal=True, scale=0.8, softcap=1.5)(s, draws)
    return options | {"bias": bias_with_gaps((s.n, s.m), draws)}


def by_heads(s, draws):
    """A mask and a bias of some leading axes, broadcast along others and along an axis of pairs."""
    mask = draws.coins((s.lead[0][1], 1, 1, s.m), 0.7)
    return {"mask": mask, "bias": draws.normal((2, 1, s.n, 1)), **LSE}


def columns(s, draws):
    """A mask of keys and a bias of keys, of one axis each."""
    return {"mask": draws.coins((s.m,), 0.6), "bias": draws.normal((s.m,)), **LSE}


def rows(s, draws):
    """A mask and a bias of queries, one column each."""
    return {"mask": draws.coins((s.n, 1), 0.6), "bias": draws.normal((s.n, 1)), **LSE}


def unseen(s, draws):
    return {"mask": np.zeros((s.n, s.m), bool), **LSE}


def hidden(s, draws):
    """Two queries that see nothing and three keys that nobody sees."""
    mask = draws.coins((s.n, s.m), 0.7)
    mask[[1, 4]], mask[:, [0, 3, 7]] = False, False
    return {"mask": mask, "softcap": 3.0, **LSE}


def hidden_by_bias(s, draws):
    bias = draws.normal((s.n, s.m))
    bias[:, [0, 3, 7]] = -np.inf
    return {"bias": bias, **LSE}


def with_nan(inputs, options, s, draws):
    """Nobody sees keys 0, 3 and 7, queries 1 and 4 see nothing."""
    inputs["k"][..., 0, :], inputs["v"][..., 0, :] = np.nan, np.nan
    inputs["k"][..., 3, 0], inputs["v"][..., 3, :] = np.inf, -np.inf
    inputs["v"][..., 7, -1] = np.nan
    if "mask" in options:
        inputs["q"][..., 1, :], inputs["q"][..., 4, 0] = np.nan, np.inf


def beyond_causal(inputs, options, s, draws):
    """With fewer keys than queries the first queries see nothing."""
    inputs["q"][..., : s.n - s.m, :] = np.nan


def large(factor):
    def change(inputs, options, s, draws):
        inputs["q"] *= factor

    return change


def ten_thousand(inputs, options, s, draws):
    """Logits up to 1e4 of both signs, of which one is far above the others of its row."""
    inputs["q"] *= 60.0
    inputs["k"] *= 60.0


def close_at_ten_thousand(inputs, options, s, draws):
    """Several logits of a row near 1e4. Their differences have lost four digits, and gradients,
    which are differences of them once more, nearly all."""
    for name in ("q", "k"):
        inputs[name] = np.where(inputs[name] < 0, -100.0, 100.0) + inputs[name]


def cancelling(inputs, options, s, draws):
    """Values of 1000 and -1000 whose averages are small, under weights that are nearly equal."""
    sign = np.where(np.arange(s.m) % 2 == 0, 1.0, -1.0)[:, None]
    inputs["q"] *= 0.01
    inputs["v"] = 1000.0 * sign + inputs["v"]


def one_key_each(inputs, options, s, draws):
    """Each query has a key, its own or an earlier one, that takes most of its weight."""
    k = np.where(inputs["k"] < 0, -1.0, 1.0)
    at = np.arange(s.n) + s.m - s.n
    at = np.where(draws.coins((s.n,), 0.5), at, draws.whole((s.n,), s.m) % (at + 1))
    inputs["k"], inputs["q"] = k, 8.0 / s.d**0.5 * k[at]


def rising(inputs, options, s, draws):
    """Later keys score higher, so that the running maximum moves from tile to tile."""
    inputs["k"] *= (np.arange(s.m) / 64.0)[:, None]


def of(label, sizes, options=LSE, change=None, **more):
    return Entry("softmax_attention", label, Sizes(*sizes), options, change, **more)


ENTRIES = [
    of("one token", (1, 1, 4, 3), pulled=True),
    of("odd sizes", (13, 13, 5, 7), small=True),
    of("lse pulled", (6, 7, 4, 3), pulled=True, small=True),
    of("y alone", (9, 9, 4, 5), {}),
    of("one column", (6, 5, 1, 1)),
    of("one query", (1, 33, 6, 5), pulled=True),
    of("one query, causal", (1, 33, 6, 5), LSE | {"causal": True}),
    of("one key", (9, 1, 4, 4)),
    of("one key, causal", (9, 1, 4, 4), LSE | {"causal": True}),
    of("more keys", (7, 12, 4, 4)),
    of("fewer keys", (12, 7, 4, 4)),
    of("causal, odd sizes", (13, 13, 5, 7), LSE | {"causal": True}),
    of("causal, as many columns", (9, 9, 4, 4), LSE | {"causal": True}, small=True),
    of("causal, more keys", (7, 12, 4, 4), LSE | {"causal": True}, small=True),
    of("causal, fewer keys", (12, 7, 4, 4), LSE | {"causal": True}, beyond_causal, pulled=True),
    of("scale", (7, 9, 4, 4), LSE | {"scale": 0.3}),
    of("negative scale", (7, 9, 4, 4), LSE | {"scale": -0.7}),
    of("scale 0", (7, 9, 4, 4), LSE | {"scale": 0.0}),
    of("softcap", (9, 11, 4, 3), LSE | {"softcap": 0.7}, pulled=True),
    of("softcap, large scores", (9, 11, 4, 3), LSE | {"softcap": 5.0}, large(30.0)),
    of("mask", (9, 11, 4, 3), masked()),
    of("mask, causal", (9, 11, 4, 3), masked(causal=True)),
    of("nothing to see", (5, 6, 4, 3), unseen, pulled=True),
    of("bias", (9, 11, 4, 3), biased(normal)),
    of("bias with -inf", (9, 11, 4, 3), biased()),
    of("bias of large numbers", (9, 11, 4, 3), biased(lambda shape, d: 3000 * d.normal(shape))),
    of("bias of low numbers alone", (5, 6, 4, 3), biased(lambda shape, d: np.full(shape, LOWEST))),
    of("bias of low numbers", (9, 11, 4, 3), biased(lambda shape, d: LOWEST * d.coins(shape, 0.4))),
    of("bias of keys, causal", (9, 11, 4, 3), biased(normal, lambda s: (s.m,), causal=True)),
    of("bias of one number", (5, 6, 4, 3), biased(normal, lambda s: (1, 1))),
    of("mask and bias of keys", (9, 11, 4, 3), columns),
    of("mask and bias of queries", (9, 11, 4, 3), rows),
    of("all options", (11, 13, 4, 3), everything, pulled=True),
    of("NaN in hidden keys and queries", (11, 12, 4, 3), hidden, with_nan, small=True),
    of("NaN hidden by a bias", (11, 12, 4, 3), hidden_by_bias, with_nan),
    of("large scores", (13, 17, 5, 4), LSE, large(300.0), pulled=True),
    of("logits of 1e4", (13, 17, 4, 4), LSE, ten_thousand),
    of("logits of 1e4, causal", (13, 13, 4, 4), LSE | {"causal": True}, ten_thousand),
    of("close logits of 1e4", (13, 17, 4, 4), LSE, close_at_ten_thousand, gradients=False),
    of("cancelling values", (12, 16, 4, 4), LSE, cancelling),
    of("one key each", (33, 33, 16, 5), LSE, one_key_each),
    of("grouped heads", (6, 7, 4, 3, heads_of(groups=3)), LSE | {"causal": True}, pulled=True),
    of("grouped heads, mask and bias", (6, 7, 4, 3, heads_of()), by_heads, pulled=True),
    of("heads of q alone", (5, 6, 3, 2, ((2, 2), (), ()))),
    of("heads of v alone", (5, 6, 3, 2, ((), (), (3,)))),
    of("nine heads", (5, 70, 2, 2, ((9,), (9,), (9,))), LSE, dtypes=WIDE_DTYPES, pulled=True),
    of("more than one tile", (130, 131, 4, 3), pulled=True),
    of("whole tiles", (128, 128, 4, 3), dtypes=WIDE_DTYPES),
    of("causal, more than one tile", (130, 130, 4, 3), LSE | {"causal": True}, pulled=True),
    of("causal, more keys, tiles", (70, 200, 3, 2), LSE | {"causal": True}, dtypes=WIDE_DTYPES),
    of("causal, fewer keys, tiles", (200, 70, 3, 2), LSE | {"causal": True}, dtypes=WIDE_DTYPES),
    of("causal, long spans", (70, 620, 3, 2), LSE | {"causal": True}, dtypes=WIDE_DTYPES),
    of("many queries", (530, 70, 2, 3), LSE, dtypes=WIDE_DTYPES, pulled=True),
    of("all options, tiles", (70, 135, 3, 2), everything, dtypes=WIDE_DTYPES, pulled=True),
    of("mask and bias of keys, tiles", (70, 135, 3, 2), columns, dtypes=WIDE_DTYPES),
    of("mask and bias of queries, tiles", (70, 135, 3, 2), rows, dtypes=WIDE_DTYPES),
    of("large scores, tiles", (130, 140, 5, 4), LSE, large(300.0), dtypes=WIDE_DTYPES),
    of("rising scores, tiles", (70, 300, 3, 2), LSE, rising, dtypes=WIDE_DTYPES),
]

ENTRIES += empties(of, LSE)


def parts(count, *, empty=0.0, low=-3.0, high=3.0):
    """Outputs and log-sum-exps of parts, some of which saw nothing."""

    def make(s, draws):
        shape = (count, *s.heads, s.n)
        lses = draws.uniform(shape, low, high)
        gone = draws.coins(shape, empty)
        ys = draws.normal((*shape, s.e))
        ys[gone], lses[gone] = np.nan, -np.inf
        return {"ys": ys, "lses": lses}

    return make


def merged(label, options, sizes=(9, 0, 1, 4), **more):
    return Entry("merge_attention", label, Sizes(*sizes), options, **more)


HEADS = ((2, 3),) * 3
ENTRIES += [
    merged("one part", parts(1)),
    merged("two parts", parts(2), small=True),
    merged("five parts", parts(5)),
    merged("parts that saw nothing", parts(3, empty=0.4), small=True),
    merged("nothing anywhere", parts(2, empty=1.1)),
    merged("far apart", parts(3, low=-1000.0, high=1000.0)),
    merged("heads", parts(3, empty=0.2), (4, 0, 1, 3, HEADS)),
]
