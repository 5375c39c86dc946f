"""Exercises of notebook 3, sparse masks."""

import functools

import numpy as np

import refattn
from refattn import masks
from refattn.exercises.base import Design, Function, Kernel, Refused

BLOCK = 16  # of exercise 3
TOKENS = 128  # of the cases of exercise 3
SIDE, TILES = 16, 128  # of exercise 4


def _digits(i, b):
    digits = []
    while i:
        i, digit = divmod(i, b)
        digits.append(digit)
    return digits


def _levels(size, b):
    """L = max(1, ceil(log_b size))."""
    levels = 1
    while b**levels < size:
        levels += 1
    return levels


def _keys(i, b):
    return masks.hierarchical(i + 1, b, causal=True)[[i]].nnz


def _keys_without_itself(i, b):
    return sum(_digits(i, b))


def _keys_from_one(i, b):
    return sum(_digits(i + 1, b))


def _keys_one_a_level(i, b):
    return 1 + sum(digit > 0 for digit in _digits(i, b))


def _keys_both_ways(i, b):
    return _levels(i + 1, b) * (b - 1) + 1


def _pairs(n, l, c):
    return masks.fixed(n, l, summary=c, causal=True).nnz


def _earlier_summaries(n, l, c):
    blocks = n // l
    return c * l * blocks * (blocks - 1) // 2


def _pairs_of_whole_blocks(n, l, c):
    return n * l + _earlier_summaries(n, l, c)


def _pairs_of_own_summaries_twice(n, l, c):
    again = n // l * (c * (c + 1) // 2)
    return n * (l + 1) // 2 + _earlier_summaries(n, l, c) + again


def _pairs_both_ways(n, l, c):
    return masks.fixed(n, l, summary=c).nnz


def _pairs_of_one_summary(n, l, c):
    return n * (l + 1) // 2 + _earlier_summaries(n, l, 1)


def _pairs_without_diagonal(n, l, c):
    return n * (l - 1) // 2 + _earlier_summaries(n, l, c)


def _pairs_with_later_blocks(n, l, c):
    return n * (l + 1) // 2 + 2 * _earlier_summaries(n, l, c)


def _masked(mask, bias=None):
    """Attention over a mask of as many tokens as came."""

    def kernel(q, k, v):
        mine = bias(len(q)) if bias else None
        return refattn.softmax_attention(q, k, v, mask=mask(len(q)).toarray(), bias=mine)

    return kernel


def _own(n):
    return masks.block_diagonal(n, BLOCK)


def _fixed(n):
    return masks.fixed(n, BLOCK)


def _fixed_causal(n):
    return masks.fixed(n, BLOCK, causal=True)


def _ends(n):
    """The last key of each block, for all."""
    return np.arange(n) % BLOCK == BLOCK - 1


def _own_end_twice(n):
    return np.log(2.0) * (_own(n).toarray() & _ends(n))


def _summaries(q, k, v):
    ends = _ends(len(q))
    return refattn.softmax_attention(q, k[ends], v[ends])


def _mean_of_two(q, k, v):
    return (_masked(_own)(q, k, v) + _summaries(q, k, v)) / 2


def _sum_of_two(q, k, v):
    return _masked(_own)(q, k, v) + _summaries(q, k, v)


def _first_keys(n):
    at = np.arange(n)
    seen = (at[:, None] // BLOCK == at // BLOCK) | (at % BLOCK == 0)
    return _csr(seen)


def _csr(seen):
    import scipy

    return scipy.sparse.csr_array(seen)


def _limit(n, d):
    return 1.3 * refattn.sparse_attention_cost(n, n, d, d, nnz=_fixed(n).nnz).flops


@functools.cache
def _mean_weights():
    """Mean of the twelve heads' exact weights, (512, 512)."""
    heads = refattn.datasets.load_heads()
    return refattn.attention_matrix(refattn.softmax_attention, heads.q, heads.k).mean(axis=0)


def tiles_of(seen):
    """Which tiles of SIDE x SIDE hold a pair, of a dense (512, 512) mask."""
    count = len(seen) // SIDE
    return seen.reshape(count, SIDE, count, SIDE).any(axis=(1, 3))


def mass_of(seen):
    """Share of the attention mass on the pairs of a dense mask, mean of the heads."""
    return float(_mean_weights()[seen].sum() / len(seen))


def heaviest_tiles():
    """The TILES tiles with the most mass, as a dense mask."""
    p = _mean_weights()
    count = len(p) // SIDE
    mass = p.reshape(count, SIDE, count, SIDE).sum(axis=(1, 3))
    chosen = mass >= np.sort(mass.ravel())[-TILES]
    return np.kron(chosen, np.ones((SIDE, SIDE), bool))


def _seen(mask):
    n = len(_mean_weights())
    if isinstance(mask, np.ndarray) or not hasattr(mask, "toarray"):
        raise Refused("Give one mask as a scipy.sparse.csr_array of booleans, (512, 512).")
    if mask.shape != (n, n):
        raise Refused(f"The mask has shape {mask.shape}; the heads have {n} queries and {n} keys.")
    return mask.toarray().astype(bool)


def _mass_of_choice(mask):
    seen = _seen(mask)
    touched = int(tiles_of(seen).sum())
    if touched > TILES:
        raise Refused(f"Over budget: the mask touches {touched} tiles, {TILES} are allowed.")
    return mass_of(seen)


def _half_empty(mask):
    seen = _seen(mask)
    touched = tiles_of(seen).sum()
    return touched <= TILES and seen.sum() < 0.95 * touched * SIDE**2


def _tiles_left(mask):
    return tiles_of(_seen(mask)).sum() < TILES - 2


def _near_diagonal(mask):
    """Whether no pair lies far from the diagonal."""
    i, j = np.nonzero(_seen(mask))
    return len(i) and abs(i - j).max() < 128


EXERCISES = {
    1: Function(
        "causal_keys",
        points=2,
        truth=_keys,
        cases=[(0, 2), (6, 2), (7, 2), (8, 2), (124, 5), (125, 5), (77, 5), (1999, 10), (511, 8)],
        hint="At level l, how many multiples of b^l lie in i's block of b^(l+1), up to i + 1? "
        "Write i in base b and look at its digits.",
        mistakes={
            "The query sees itself as well: one key more in every row.": _keys_without_itself,
            "A query at the end of a block sees the b - 1 others of that block too. Counting from "
            "1 the digits carry over just there: count in i, not in i + 1.": _keys_from_one,
            "A level has up to b - 1 representatives before the query, and not only one: how many "
            "is what the digit says.": _keys_one_a_level,
            "That is the row of the mask with both directions, equation (5): here the keys after "
            "i are left out.": _keys_both_ways,
        },
    ),
    2: Function(
        "fixed_pairs",
        points=2,
        truth=_pairs,
        cases=[(64, 8, 1), (64, 8, 3), (512, 16, 4), (60, 12, 12), (256, 256, 5), (100, 1, 1)],
        hint="Count the blocks on the diagonal, then for each pair of blocks the summaries of the "
        "earlier one that the queries of the later one read.",
        mistakes={
            "Inside its block a query sees keys up to itself only: a triangle, not a "
            "square.": _pairs_of_whole_blocks,
            "The summaries of a query's own block are keys of that block, and counted already: "
            "only earlier blocks add pairs.": _pairs_of_own_summaries_twice,
            "This counts the mask of both directions; the paper's is causal, so a summary is read "
            "by later blocks only.": _pairs_both_ways,
            "Each block has c summaries, not one.": _pairs_of_one_summary,
            "A summary is read by later blocks only; this lets every other block read "
            "it.": _pairs_with_later_blocks,
            "The query sees itself: the triangle of a block includes its "
            "diagonal.": _pairs_without_diagonal,
        },
    ),
    3: Kernel(
        "fixed_kernel",
        points=3,
        mechanism="sparse_attention",
        options=lambda: dict(mask=_fixed(TOKENS)),
        cases="square",
        hint="Cut q, k and v into blocks of l: one batch of small products is each query against "
        "its block, one thin product is all queries against k[l - 1 :: l].",
        mistakes={
            "The last key of a query's own block is counted twice: it is in the block and among "
            "the summaries. Let one of the two be -inf.": _masked(_fixed, _own_end_twice),
            "Two softmaxes have two denominators, and their mean weighs both parts alike. One "
            "maximum and one sum over both parts make it one softmax.": _mean_of_two,
            "Two softmaxes were added: the weights of a query now sum to two. One maximum and one "
            "sum over both parts make it one softmax.": _sum_of_two,
            "The summary of a block is its last key, the one that has read the whole block where "
            "the mask is causal; this takes the first.": _masked(_first_keys),
            "That is the causal mask. Here queries see keys on both sides: their whole block, and "
            "the summaries of later blocks as well.": _masked(_fixed_causal),
            "Queries see their own block only: the summaries of the other blocks are "
            "missing.": _masked(_own),
            "Queries see the summaries only: their own block is missing.": _summaries,
        },
        flops=_limit,
        memory=lambda n, d: 4 * n * n / 2,
        advice="Right, but it does more than the pairs need: n x n scores, or a copy of k for "
        "every query. Products of blocks need neither.",
    ),
    4: Design(
        "a mask of 128 tiles",
        points=3,
        hint="Which tiles hold the most mass, summed over the heads? A tile costs the same however "
        "many of its pairs are used.",
        score=_mass_of_choice,
        plain=lambda: mass_of(masks.block_diagonal(512, 64).toarray()),
        best=lambda: mass_of(heaviest_tiles()),
        unit="of the mass",
        notes={
            "Tiles are paid for and left half empty: fill every tile that is touched.": _half_empty,
            "There are tiles left: spend them all.": _tiles_left,
            "All pairs lie near the diagonal. Figure 03_oracle says that much mass is "
            "elsewhere: look at which columns are heavy.": _near_diagonal,
        },
    ),
}
