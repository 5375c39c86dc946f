"""Exercises of notebook 8, gates."""

import functools

import numpy as np

import refattn
from refattn import gates
from refattn.encoder import load_encoder
from refattn.exercises.base import Design, Function, Kernel, Refused

LAYERS, HEADS, CLOSED = 6, 12, 24
TEXTS = (  # every other sentence of the notebook
    "The rabbit-hole went straight on like a tunnel for some way, and then dipped suddenly down.",
    "She took down a jar from one of the shelves as she passed: it was labelled orange marmalade.",
    "A sum of many small terms can be larger than its greatest term.",
    "Add two eggs to the flour, stir well, and bake for half an hour.",
)
# Greedy, three heads at a time, then improved by single exchanges.
BEST = (
    (0, (0, 6, 7, 8, 9, 11)),
    (1, (2, 4, 5, 6, 9, 10, 11)),
    (2, (2, 9, 11)),
    (3, (5, 8, 10)),
    (4, (0, 2, 5, 9, 11)),
)


def block_products(n, c, width, inner):
    """Sizes (a, b, e) of the products (a, b) @ (b, e) in a block of c n tokens, heads as one."""
    t = round(c * n)
    projections = 4 * [(t, width, width)]
    attention = [(t, width, t), (t, t, width)]
    return [*projections, *attention, (t, width, inner), (t, inner, width)]


def _block_flops(n, c, width, inner):
    return sum(2 * a * b * e for a, b, e in block_products(n, c, width, inner))


def _dense_keys(n, c, width, inner):
    t = c * n
    return 8 * t * width**2 + 4 * t * n * width + 4 * t * width * inner


def _dense_rest(n, c, width, inner):
    return 8 * n * width**2 + 4 * (c * n) ** 2 * width + 4 * n * width * inner


def _one_flop(n, c, width, inner):
    return _block_flops(n, c, width, inner) / 2


def _all_squared(n, c, width, inner):
    return c * c * _block_flops(n, 1, width, inner)


def _top_k(scores, k):
    return gates.top_k(scores, k)[:, 0]


def _ties_up(scores, k):
    return _top_k(scores[::-1], k)[::-1]


def _all_ties(scores, k):
    return (scores >= np.sort(scores)[len(scores) - k]).astype(float)


def _smallest(scores, k):
    return _top_k(-scores, k)


def _scores_kept(scores, k):
    return _top_k(scores, k) * scores


def _above(scores, k):
    return (scores > np.sort(scores)[len(scores) - k]).astype(float)


def _one_more(scores, k):
    return _top_k(scores, min(k + 1, len(scores)))


def _score_cases():
    rng = np.random.default_rng(0)
    return [
        (np.array([0.3, 0.9, 0.5, 0.1]), 2),
        (np.array([1.0, 3.0, 3.0, 3.0, 0.0]), 2),
        (np.zeros(7), 3),
        (-np.arange(5.0), 5),
        (rng.integers(0, 9, 50) / 4.0 - 1, 20),
        (rng.integers(0, 4, 3000) / 4.0, 1000),  # ties that an unstable sort mixes up
    ]


def first_column(q, k, v):
    """The gate of exercise 3: open where the first column of the query is at least 1."""
    return gates.threshold(q[..., 0], 1.0)


def _always(q, k, v):
    return refattn.softmax_attention(q, k, v)


def _tokens(q, k, v):
    """Closed rows are no keys either."""
    if len(q) != len(k):
        raise ValueError("as many queries as keys")
    rows = q[:, 0] >= 1
    y = np.zeros((len(q), v.shape[1]), q.dtype)
    y[rows] = refattn.softmax_attention(q[rows], k[rows], v[rows])
    return y


def _closed_for_open(q, k, v):
    return refattn.gated_attention(q, k, v, gate=1 - first_column(q, k, v))


def _keys_closed(q, k, v):
    return refattn.softmax_attention(q, k, v, mask=k[:, 0] >= 1)


def _weighted(q, k, v):
    return q[:, :1] * refattn.gated_attention(q, k, v, gate=first_column(q, k, v))


def _flops_of_open(n, d):
    """A quarter more than the open rows cost, on the arrays that the cost is taken on."""
    q = np.random.default_rng(1).standard_normal((3, n, d)).astype(np.float32)[0]
    rows = int((q[:, 0] >= 1).sum())
    return 1.25 * refattn.gated_attention_cost(n, n, d, d, open_rows=rows).flops


@functools.cache
def _sentences():
    """The encoder, the token ids and the embeddings without a gate."""
    encoder = load_encoder()
    tokens = [encoder.tokenize(text) for text in TEXTS]
    return encoder, tokens, [encoder.embed(ids) for ids in tokens]


def similarity(closed):
    """Mean cosine of the embeddings with these heads closed to those without a gate."""
    encoder, tokens, plain = _sentences()
    gate = np.ones((LAYERS, HEADS, 1, 1), np.float32)
    for layer, head in closed:
        gate[layer, head] = 0

    def attend(g):
        return lambda q, k, v: g * refattn.softmax_attention(q, k, v)  # small: not worth skipping

    layers = [attend(g) for g in gate]
    pairs = zip(tokens, plain, strict=True)
    return float(np.mean([encoder.embed(ids, attention=layers) @ y for ids, y in pairs]))


def _pairs(answer):
    """The answer as pairs of whole numbers."""
    try:
        pairs = [(int(layer), int(head)) for layer, head in answer]
    except (TypeError, ValueError):
        raise Refused("Give a list of pairs (layer, head) of whole numbers.") from None
    return pairs


def _similarity_of_choice(answer):
    pairs = _pairs(answer)
    if not all(0 <= layer < LAYERS and 0 <= head < HEADS for layer, head in pairs):
        raise Refused("Layers go from 0 to 5, heads from 0 to 11.")
    if len(set(pairs)) != CLOSED or len(pairs) != CLOSED:
        raise Refused(f"Close {CLOSED} different heads; these are {len(set(pairs))}.")
    return similarity(pairs)


@functools.cache
def _plain():
    return similarity([(layer, head) for layer in (0, 1) for head in range(HEADS)])


@functools.cache
def _best():
    return similarity([(layer, head) for layer, heads in BEST for head in heads])


def _of_the_last_layer(answer):
    return any(layer == LAYERS - 1 for layer, _ in answer)


def _whole_layers(answer):
    layers = [layer for layer, _ in answer]
    return any(layers.count(layer) == HEADS for layer in range(LAYERS))


EXERCISES = {
    1: Function(
        "block_flops",
        points=2,
        truth=_block_flops,
        cases=[(512, 1, 384, 1536), (512, 0.125, 384, 1536), (64, 0.25, 8, 8), (10, 0.5, 3, 5)],
        tolerance=lambda wanted: 1e-9 * wanted,
        hint="With t = c n: which products are there, and which of their sizes are t?",
        mistakes={
            "The keys are those of all n tokens here. A token that takes no part is no key either: "
            "scores are t by t.": _dense_keys,
            "Only the scores shrink here. Projections and MLP are done token by token, for t "
            "tokens.": _dense_rest,
            "One multiply and one add for each term: two FLOPs, not one.": _one_flop,
            "All is scaled by c squared here. Only products with two sizes t are; the others "
            "have one.": _all_squared,
        },
    ),
    2: Function(
        "top_k",
        points=2,
        truth=_top_k,
        cases=_score_cases,
        hint="Sort so that equal scores stay in their order: which kind of sort promises that?",
        mistakes={
            "Of equal scores it opens the last ones. Reversing a sorted order reverses ties as "
            "well.": _ties_up,
            "It opens every row that is as large as the k-th: with ties that is more than "
            "k.": _all_ties,
            "It opens the smallest scores.": _smallest,
            "It returns the scores of the open rows. The gate is 1 there.": _scores_kept,
            "It opens only what is larger than the k-th score, and the k-th is to be open "
            "too.": _above,
            "It opens one row more than k.": _one_more,
        },
    ),
    3: Kernel(
        "skipping",
        points=3,
        mechanism="gated_attention",
        options=dict(gate=first_column),
        hint="Which rows of q are needed at all? Attend with these, then put them in their places.",
        mistakes={
            "No row is closed: this is softmax attention.": _always,
            "Its closed rows are no keys either. A gate on queries leaves all keys where they "
            "are.": _tokens,
            "It opens the rows that are to be closed.": _closed_for_open,
            "It closes keys here, for all queries. The gate is on queries: it closes rows of the "
            "answer.": _keys_closed,
            "It multiplies by the score. The gate is 1 where the score is at least 1, not the "
            "score itself.": _weighted,
        },
        flops=_flops_of_open,
        memory=lambda n, d: 4 * n * n,
        advice="Right, but it computes rows that are multiplied by zero. Take the open rows of q "
        "before the scores.",
    ),
    4: Design(
        "heads to close",
        points=3,
        hint="Close one head at a time and look at what is lost; then see that effects add up.",
        score=_similarity_of_choice,
        plain=_plain,
        best=_best,
        unit="cosine",
        notes={
            "The last layer is what the embedding is read from: its heads cost the "
            "most.": _of_the_last_layer,
            "A whole layer is closed here. Heads of one layer differ: which of them does "
            "little?": _whole_layers,
        },
        enough=0.92,
    ),
}
