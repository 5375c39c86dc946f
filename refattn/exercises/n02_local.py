"""Exercises of notebook 2, local attention."""

import numpy as np

import refattn
from refattn import course, masks
from refattn.exercises.base import Design, Function, Kernel, Refused
from refattn.exercises.heads import exact_heads

HEADS = 12
WINDOW = 5  # of exercise 2


def _pairs(n, left, right):
    return masks.local(n, (left, right)).nnz


def _endless(n, left, right):
    return n * (left + right + 1)


def _without_itself(n, left, right):
    return n * (left + right) - left * (left + 1) // 2 - right * (right + 1) // 2


def _squares_cut(n, left, right):
    return n * (left + right + 1) - left**2 - right**2


def _both_sides(q, k, v):
    return refattn.local_attention(q, k, v, window=WINDOW)


def flops_of(windows):
    """FLOPs of one window a head on 512 tokens."""
    return sum(refattn.local_attention_cost(512, 512, 32, 32, window=w).flops for w in windows)


def mean_error(windows):
    """Mean relative error over the heads."""
    heads, exact = exact_heads().heads, exact_heads().y
    pairs = zip(heads.kind, windows, strict=True)
    ys = [refattn.local_attention(*heads.pick(kind), window=w) for kind, w in pairs]
    return float(course.relative_error(np.array(ys), exact).mean())


def _windows(choice):
    kinds = exact_heads().heads.kind
    if not isinstance(choice, dict) or set(choice) != set(kinds):
        raise Refused(f"Give a dict with a window for each of: {', '.join(kinds)}.")
    windows = [choice[kind] for kind in kinds]
    if not all(isinstance(w, (int, np.integer)) and w >= 0 for w in windows):
        raise Refused("Each window must be a whole number, 0 or more.")
    return windows


def _error_of_choice(choice):
    windows = _windows(choice)
    spent = flops_of(windows) / flops_of([32] * HEADS)
    if spent > 1:
        raise Refused(f"Over budget: these windows cost {spent:.2f} of what is allowed.")
    return mean_error(windows)


def reach(dilations, n=243, window=1):
    """Of how many of n tokens the middle one can hear through these layers."""
    heard = np.zeros(n, int)
    heard[n // 2] = 1
    for dilation in dilations:
        heard = masks.local(n, window, dilation=dilation).T.astype(int) @ heard > 0
    return int(heard.sum())


def _four_dilations(x):
    good = isinstance(x, (list, tuple, np.ndarray)) and len(x) == 4
    return good and all(isinstance(one, (int, np.integer)) and one >= 1 for one in x)


def _reach_of_choice(dilations):
    if not _four_dilations(dilations):
        raise Refused("Give four whole numbers, each at least 1: one dilation a layer.")
    return reach(dilations)


EXERCISES = {
    1: Function(
        "pairs",
        points=2,
        truth=_pairs,
        cases=[(10, 2, 3), (512, 16, 16), (1000, 0, 999), (7, 6, 0)],
        hint="Start from n (left + right + 1); how many are cut off at each end?",
        mistakes={
            "These are the pairs with no ends: the first queries have no left neighbours, the last "
            "no right ones.": _endless,
            "Each query counts itself as well: it has left + right + 1 keys.": _without_itself,
            "Each end cuts off a triangle with sides of `left` keys, left (left + 1) / 2 in all: "
            "the first query misses `left`, the next one fewer.": _squares_cut,
        },
    ),
    2: Kernel(
        "causal_window",
        points=3,
        mechanism="local_attention",
        options=dict(window=WINDOW, causal=True),
        cases="square",
        hint="For row i, which slice of k is seen? It must not start below 0. One row at a time is "
        "fine, with y in q's dtype.",
        mistakes={
            "It sees the keys after the query as well: "
            "a causal window ends at the query itself.": _both_sides,
        },
        flops=lambda n, d: 2 * refattn.local_attention_cost(n, n, d, d, window=(WINDOW, 0)).flops,
        memory=lambda n, d: 4 * n * n / 2,
        advice="Right, but it computes scores that no query may see. Take only the keys in reach.",
    ),
    3: Design(
        "a window for each head",
        points=3,
        hint="Where does a wider window help most for its price, and where hardly? Figure "
        "02_error and the array `errors` behind it tell, head by head.",
        score=_error_of_choice,
        plain=lambda: mean_error([32] * HEADS),
        best=lambda: mean_error([1, 6, 44, 48, 9, 26, 44, 52, 7, 48, 44, 60]),
        unit="mean error",
        enough=0.8,
    ),
    4: Design(
        "dilations",
        points=2,
        hint="Let the second layer step over all that the first one has heard.",
        score=_reach_of_choice,
        plain=9,
        best=81,
        unit="tokens",
        notes={
            "With one dilation for all layers, most of the tokens in reach are heard twice or "
            "more, by several paths.": lambda x: _four_dilations(x) and len(set(x)) == 1,
            "The order of layers does not matter, but a dilation that comes twice hears the same "
            "tokens twice.": lambda x: _four_dilations(x) and len(set(x)) < 4,
        },
    ),
}
