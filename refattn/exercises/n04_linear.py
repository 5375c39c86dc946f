"""Exercises of notebook 4, linear attention."""

import functools

import numpy as np

import refattn
from refattn import course
from refattn.exercises.base import Design, Function, Kernel, Refused, Unfilled
from refattn.exercises.heads import exact_heads
from refattn.linear import FEATURE_MAPS, FeatureMap

WIDTH = 64  # features that exercise 5 allows
elu = FEATURE_MAPS["elu"].query


def _brackets(n, r, e, factor=2.0, sums=1, read=1):
    """FLOPs of (A B) V and A (B V), sums and division included, and the n where they are equal;
    A (n, r), B (r, n), V (n, e). Other numbers than 2, 1, 1 are mistakes."""
    left = n * n * (factor * (r + e) + sums) + sums * n * e
    right = n * (factor * r * e * (1 + read) + sums * (r + factor * r + e))
    own = factor * r * e * (1 + read) + sums * (r + factor * r)  # of the right, n and e n apart
    return left, right, own / (factor * (r + e) + sums)


def _brackets_of_products_alone(n, r, e):
    return _brackets(n, r, e, sums=0)


def _brackets_of_one_flop(n, r, e):
    return _brackets(n, r, e, factor=1.0)


def _brackets_of_one_flop_alone(n, r, e):
    return _brackets(n, r, e, factor=1.0, sums=0)


def _brackets_without_reading(n, r, e):
    return _brackets(n, r, e, read=0)


def _brackets_of_equal_widths(n, r, e):
    return *_brackets(n, r, e)[:2], float(r)


def _brackets_without_division(n, r, e):
    left, right, crossing = _brackets(n, r, e)
    return left - n * e, right - n * e, crossing


def _brackets_that_cross_as_products(n, r, e):
    return *_brackets(n, r, e)[:2], _brackets_of_products_alone(n, r, e)[2]


@functools.cache
def _tokens():
    """States after some tokens, and the token that comes next."""
    rng = np.random.default_rng(4)
    found = []
    for past, d, e in [(3, 4, 4), (50, 5, 3), (1, 2, 7)]:
        q, k, v = (rng.standard_normal((past + 1, width)) for width in (d, d, e))
        S, z = elu(k[:-1]).T @ v[:-1], elu(k[:-1]).sum(axis=0)
        found.append((S, z, q[-1], k[-1], v[-1]))
    return found


def _step(S, z, q, k, v):
    y, (S, z) = refattn.linear_attention_step((S, z), q, k, v)
    return y, S, z


def _step_that_reads_first(S, z, q, k, v):
    return (elu(q) @ S / (elu(q) @ z), *_step(S, z, q, k, v)[1:])


def _step_without_division(S, z, q, k, v):
    _, S, z = _step(S, z, q, k, v)
    return elu(q) @ S, S, z


def _step_with_a_bare_query(S, z, q, k, v):
    _, S, z = _step(S, z, q, k, v)
    return q @ S / (q @ z), S, z


def _step_without_one(S, z, q, k, v):
    S, z = S + (elu(k) - 1)[:, None] * v, z + elu(k) - 1
    return (elu(q) - 1) @ S / ((elu(q) - 1) @ z), S, z


def _step_of_bare_keys(S, z, q, k, v):
    S, z = S + k[:, None] * v, z + k
    return elu(q) @ S / (elu(q) @ z), S, z


def _wrong_axes(over_q, over_k, divided=True):
    """Softmax of the queries and of the keys along these axes."""

    def kernel(q, k, v):
        q, k, v = (x.astype(np.float32) for x in (q, k, v))  # 0 / 0 where the answer has it
        a, b = _softmax(q, over_q), _softmax(k, over_k)
        num = a @ (b.T @ v)
        return num / (a @ b.sum(axis=0))[:, None] if divided else num

    return kernel


def _scaled(q, k, v):
    root = q.shape[1] ** 0.5
    return refattn.linear_attention(q / root, k / root, v, feature_map="softmax")


def _of_elu(q, k, v):
    return refattn.linear_attention(q, k, v)


def _softmax(x, axis):
    a = np.exp(x - x.max(axis=axis, keepdims=True))
    return a / a.sum(axis=axis, keepdims=True)


def _reads_before_it_writes(q, k, v):
    """Causal without the token itself."""
    a = np.tril(elu(q) @ elu(k).T, -1)
    den = a.sum(axis=1, keepdims=True)
    return np.where(den == 0, 0, a @ v / np.where(den == 0, 1, den))


def _most_flops(n, d):
    return 6 * refattn.linear_attention_cost(n, n, d, d).flops  # chunks of 128 have room


def mean_error(phi_q, phi_k):
    """Mean over the heads of the error against softmax attention."""
    _, q, k, v, exact = exact_heads()
    pair = FeatureMap(phi_q, phi_k)
    y = refattn.linear_attention(q.copy(), k.copy(), v, feature_map=pair)  # a map may write to it
    return float(course.relative_error(y, exact).mean())


def _pair(choice):
    if isinstance(choice, FeatureMap):
        return choice.query, choice.key
    pair = choice if isinstance(choice, (tuple, list)) else (choice, choice)
    if len(pair) != 2 or not all(map(callable, pair)):
        raise Refused("Give a function x (..., n, 32) -> (..., n, r), or a pair: (phi_q, phi_k).")
    return pair


def _score_of_map(choice):
    pair = _pair(choice)
    q, k = exact_heads().q, exact_heads().k
    widths = []
    for phi, x in zip(pair, (q, k), strict=True):
        features = phi(x.copy())
        if features is None:
            raise Unfilled
        features = np.asarray(features)
        if features.shape[:-1] != x.shape[:-1]:
            raise Refused(f"From {x.shape} the map makes {features.shape}: keep all but the last.")
        if not np.all(np.isfinite(features)):
            raise Refused("Some features are not finite: does exp overflow?")
        alone = np.asarray(phi(x[:, 7:8].copy()))
        if not np.allclose(alone, features[:, 7:8], rtol=1e-6, atol=1e-9 * abs(features).max()):
            raise Refused(
                "The features of a row change when other rows are left out, or from call to call: "
                "no state could be carried from token to token. Let each row stand alone."
            )
        widths.append(features.shape[-1])
    if widths[0] != widths[1]:
        raise Refused(f"phi_q has {widths[0]} features and phi_k {widths[1]}: give both as many.")
    if widths[0] > WIDTH:
        raise Refused(f"Over budget: {widths[0]} features, and {WIDTH} are allowed.")
    return mean_error(*pair)


def _halves(x):
    """The positive and the negative parts, so that no row loses its signs."""
    return np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)], axis=-1)


def _exponentials(x):
    return _softmax(2 * np.concatenate([x, -x], axis=-1), -1)


def _powers(x):
    return _halves(x / np.linalg.norm(x, axis=-1, keepdims=True)) ** 2.5


@np.errstate(all="ignore")
def _may_be_negative(choice):
    phi_q, phi_k = _pair(choice)
    q, k = exact_heads().q[:, :32].copy(), exact_heads().k[:, :32].copy()
    weights = phi_q(q) @ phi_k(k).swapaxes(-1, -2)
    return np.any(weights < 0)


def _has_32(choice):
    return _pair(choice)[0](exact_heads().q[:, :1].copy()).shape[-1] <= 32


@np.errstate(all="ignore")
def _is_flat(choice):
    """Whether the largest weight of a row is on average below four times an equal share."""
    q, k = exact_heads().q.copy(), exact_heads().k.copy()
    phi_q, phi_k = _pair(choice)
    a = phi_q(q) @ phi_k(k).swapaxes(-1, -2)
    return np.mean(a.max(axis=-1) / a.mean(axis=-1)) < 4


EXERCISES = {
    1: Function(
        "brackets",
        points=2,
        truth=_brackets,
        cases=[(512, 32, 32), (1000, 64, 16), (4096, 561, 32)],
        parts=("left", "right", "crossing"),
        tolerance=lambda wanted: 1e-9 * wanted,
        hint="(a, b) times (b, c) costs 2 a b c FLOPs. List each product, sum and division of "
        "either side; then set left = right.",
        mistakes={
            "These are the products alone: row sums, z, phi(Q) z and the division cost as well.": (
                _brackets_of_products_alone
            ),
            "A dot product of length r is r multiplications and r additions, 2 r FLOPs.": (
                _brackets_of_one_flop
            ),
            "A dot product of length r is 2 r FLOPs; and the denominator costs as well.": (
                _brackets_of_one_flop_alone
            ),
            "phi(K)^T V gathers, phi(Q) S reads: on the right, too, there are two products.": (
                _brackets_without_reading
            ),
            "N = r is near where they cross when r = e; set left = right and solve for N.": (
                _brackets_of_equal_widths
            ),
            "The products alone cross there. Set the whole of left equal to the whole of right.": (
                _brackets_that_cross_as_products
            ),
            "The division is missing: n e FLOPs on either side.": _brackets_without_division,
        },
    ),
    2: Kernel(
        "efficient_attention",
        points=2,
        mechanism="linear_attention",
        options=dict(feature_map="softmax"),
        hint="First the features: one softmax along each axis. Then which product is small?",
        mistakes={
            "Both softmaxes run over features: the keys' runs over positions (axis 0), so that "
            "each row of S is a weighted mean of values.": _wrong_axes(1, 1),
            "Both softmaxes run over features, and then the rows of weights do not sum to one: "
            "the keys' runs over positions (axis 0).": _wrong_axes(1, 1, divided=False),
            "Both softmaxes run over positions: the queries' runs over features (axis 1), so "
            "that a query does not depend on other queries.": _wrong_axes(0, 0),
            "The two axes are exchanged: queries over features, keys over positions.": (
                _wrong_axes(0, 1)
            ),
            "The scores of softmax attention are divided by sqrt(d); here there are no scores, and "
            "q and k go into the maps as they are.": _scaled,
            "The features are elu + 1; here they are two softmaxes.": _of_elu,
        },
        flops=lambda n, d: 2 * refattn.linear_attention_cost(n, n, d, d).flops,
        advice="Right, but an n x n array has been made on the way. Put the brackets elsewhere.",
    ),
    3: Function(
        "step",
        points=2,
        truth=_step,
        cases=_tokens,
        parts=("y", "S", "z"),
        tolerance=1e-12,
        hint="Write phi(k) v^T and phi(k) into new S and z; then read them with phi(q).",
        mistakes={
            "The query reads before the key is written: with j <= i a token also sees itself.": (
                _step_that_reads_first
            ),
            "y is the numerator alone: divide by phi(q) . z.": _step_without_division,
            "The query is bare: it goes through phi as well, or the weights may be negative.": (
                _step_with_a_bare_query
            ),
            "S and z gather bare keys: they are sums over phi(k).": _step_of_bare_keys,
            "The features are elu without the + 1, and may be negative.": _step_without_one,
        },
    ),
    4: Kernel(
        "causal_linear",
        points=2,
        mechanism="linear_attention",
        options=dict(causal=True),
        cases="square",
        hint="A loop over tokens with a state will do. Chunks of tokens need fewer turns; inside a "
        "chunk, a triangle.",
        mistakes={
            "A query reads the state before its own key is in it: j <= i holds for j = i.": (
                _reads_before_it_writes
            ),
        },
        flops=_most_flops,
        memory=lambda n, d: n * n,
        advice="Right, but dear: an n x n array, very long chunks, or a state for every position. "
        "One state is enough, since nobody reads an old one again; short chunks have few pairs.",
    ),
    5: Design(
        "a feature map",
        points=2,
        hint="What lets one weight of a row be much larger than the others? Try powers, exp, "
        "rows of norm one.",
        score=_score_of_map,
        plain=lambda: mean_error(elu, elu),
        best=lambda: mean_error(_powers, _exponentials),
        unit="mean error",
        enough=0.9,
        notes={
            "Some weights are negative: a denominator near zero then blows up a row.": (
                _may_be_negative
            ),
            "The weights are nearly equal, so y is nearly the mean of the values: make the "
            "features steeper.": _is_flat,
            f"There is room for {WIDTH} features: x and -x can both have their own.": _has_32,
        },
    ),
}
