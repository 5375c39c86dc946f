"""Exercises of notebook 6, Performer."""

import functools
from dataclasses import dataclass

import numpy as np

import refattn
from refattn import course
from refattn.exercises.base import Design, Function, Kernel, Refused, unfilled
from refattn.exercises.heads import exact_heads
from refattn.exercises.mark import Mark
from refattn.verify import check_features

D = 32  # columns of a head
DRAWS = 4  # of exercise 4
MOST = 4096
KINDS = ("positive", "hyperbolic", "trig")
NAMES = tuple(refattn.datasets.load_heads().kind)


def omega():
    """The directions of exercise 3."""
    return refattn.random_features(64, D, rng=0)


# 1: a formula


def _needed(x, y, epsilon):
    """Whole features; the small number keeps rounding from adding one."""
    wanted = refattn.performer.kernel_variance(x, y, 1) * np.exp(-2 * x @ y) / epsilon**2
    return np.ceil(wanted * (1 - 1e-12))


def _pairs():
    rng = np.random.default_rng(1)
    pairs = [rng.standard_normal((2, d)) * size for d, size in ((3, 0.6), (8, 0.5), (4, 0.9))]
    return [(*pair, epsilon) for pair, epsilon in zip(pairs, (0.1, 0.02, 0.3), strict=True)]


def _slip(z="plus", power=2, one=1.0, absolute=False, half=1.0, whole=np.ceil):
    """Features by a formula that is slightly off."""

    def wrong(x, y, epsilon):
        vector = x + y if z == "plus" else x - y
        factor = np.exp(2 * x @ y) if absolute else 1.0
        return whole(factor * (np.exp(half * vector @ vector) - one) / epsilon**power)

    return wrong


# 2: draws, by their statistics


def _only_rounding(report):
    """Whether all that is wrong is rounding, as of Gram-Schmidt's method in one pass."""
    wrong = [line for line in report.lines if line.trouble]
    return [line.case for line in wrong] == ["rows orthogonal"] and wrong[0].error < 1e-6


@dataclass(frozen=True)
class Draw:
    """A function draw(num_features, d, rng), judged by ``refattn.verify.check_features``."""

    title: str
    points: int
    hint: str

    def check(self, answer):
        if answer is None or answer is ...:
            return unfilled(self)
        if not callable(answer):
            words = f"expected a function of num_features, d and rng, got {type(answer).__name__}"
            return Mark(self.title, self.points, words=(words,))

        def draw(num_features, d, rng):
            return answer(num_features, d, np.random.default_rng(rng))

        report = check_features(draw, title=self.title)
        if not report.filled:
            return unfilled(self)
        if report.passed:
            return Mark(self.title, self.points, points=self.points, report=report)
        if _only_rounding(report):
            return Mark(self.title, self.points, points=self.points)
        words = (*report.explained, f"Hint: {self.hint}")
        return Mark(self.title, self.points, words=words, report=report)


# 3: a kernel


def _with(kind="positive", scale=None):
    """A right Performer with another option than was asked for."""
    return lambda q, k, v: refattn.performer_attention(
        q, k, v, omega=omega(), kind=kind, scale=scale
    )


def _flops(n, d):
    """1.5 times the count leaves room for features that are written plainly."""
    return 1.5 * refattn.performer_attention_cost(n, n, d, d, num_features=64).flops


# 4: a plan


@functools.cache
def error_of(name, kind, num_features):
    """Relative error of a head's output, the mean of four draws."""
    heads, exact = exact_heads().heads, exact_heads().y
    found = []
    for seed in range(DRAWS):
        drawn = refattn.random_features(num_features, D, rng=seed)
        y = refattn.performer_attention(*heads.pick(name), omega=drawn, kind=kind)
        found.append(course.relative_error(y, exact[NAMES.index(name)]))
    return float(np.mean(found))


def flops_of(kind, num_features):
    """FLOPs of a head on 512 tokens."""
    count = refattn.performer_attention_cost
    return count(512, 512, D, D, num_features=num_features, kind=kind).flops


BUDGET = 12 * flops_of("positive", 256)


def mean_error(plan):
    """Mean over the heads."""
    return float(np.mean([error_of(name, *plan[name]) for name in NAMES]))


def _fits(one):
    """Whether it is (kind, number of directions)."""
    if not isinstance(one, (tuple, list)) or len(one) != 2 or one[0] not in KINDS:
        return False
    return isinstance(one[1], (int, np.integer)) and 1 <= one[1] <= MOST


def _error_of_plan(plan):
    if not isinstance(plan, dict) or set(plan) != set(NAMES):
        raise Refused(f"Give a dict with a pair for each of: {', '.join(NAMES)}.")
    if not all(map(_fits, plan.values())):
        raise Refused(
            "Each head needs a pair such as ('positive', 256): a kind of positive, hyperbolic or "
            f"trig, and a whole number of directions from 1 to {MOST}."
        )
    spent = sum(flops_of(kind, int(M)) for kind, M in plan.values()) / BUDGET
    if spent > 1:
        raise Refused(f"Over budget: this plan costs {spent:.2f} of what is allowed.")
    return mean_error({name: (kind, int(M)) for name, (kind, M) in plan.items()})


# By dynamic programming over powers of two.
BEST = {
    "large logits": ("positive", 8),
    "high rank": ("hyperbolic", 8),
    "low rank": ("hyperbolic", 512),
    "sink": ("hyperbolic", 128),
    "local": ("hyperbolic", 16),
    "diffuse": ("hyperbolic", 256),
    "small logits": ("hyperbolic", 256),
    "global": ("hyperbolic", 512),
    "peaked": ("hyperbolic", 16),
    "typical early": ("positive", 128),
    "typical middle": ("positive", 64),
    "typical late": ("hyperbolic", 128),
}

EXERCISES = {
    1: Function(
        "features needed",
        points=2,
        truth=_needed,
        cases=_pairs,
        hint="Set the first part of (4) equal to epsilon squared, solve for M, round up.",
        mistakes={
            "A standard deviation is the root of a variance: epsilon enters squared.": _slip(
                power=1
            ),
            "Positive features depend on |x + y|; |x - y| belongs to the trigonometric "
            "kind.": _slip(z="minus"),
            "Without the - 1 two vectors with x + y = 0 would need features too; their estimate is "
            "exact.": _slip(one=0.0),
            "That is for the absolute deviation; the relative one is divided by the kernel.": _slip(
                absolute=True
            ),
            "Half of |x + y|^2 is the exponent of a mean, in (2); the variance is made of "
            "squares.": _slip(half=0.5),
            "Rounded down, it is one too few: the deviation is still above epsilon.": _slip(
                whole=np.floor
            ),
        },
    ),
    2: Draw(
        "orthogonal features",
        points=2,
        hint="QR of a d x d Gaussian matrix for each block: which signs does it leave open? Then a "
        "chi_d norm for each row.",
    ),
    3: Kernel(
        "a Performer",
        points=3,
        mechanism="performer_attention",
        options=lambda: dict(omega=omega()),
        hint="Features of queries and keys, two sums over keys. Which maxima may be taken from "
        "the exponents, and where must they be given back?",
        mistakes={
            "q and k are each divided by d^(1/4), so that x . y is q . k / sqrt(d).": _with(
                scale=1.0
            ),
            "Each of q and k was divided by sqrt(d): their product needs it once.": _with(
                scale=1.0 / D
            ),
        },
        flops=_flops,
        memory=lambda n, d: 4 * n * n / 2,
        at=(2048, D),  # where float64 features take less than half of N x N weights
        advice="Right, but it costs as much as pairs of tokens: sum over the keys before a query "
        "comes in.",
    ),
    4: Design(
        "a plan for each head",
        points=3,
        hint="Where do more features still help? Look at figure 06_error and the table under it.",
        score=_error_of_plan,
        plain=lambda: mean_error(dict.fromkeys(NAMES, ("positive", 256))),
        best=lambda: mean_error(BEST),
        unit="mean error",
        notes={
            "Trigonometric features have denominators near zero on these heads: one such head "
            "outweighs all others.": lambda plan: any(kind == "trig" for kind, _ in plan.values()),
            "The heads with the largest norms gain nothing from hundreds of features: spend them "
            "elsewhere.": lambda plan: (
                min(plan[x][1] for x in ("large logits", "high rank", "peaked")) >= 128
            ),
        },
    ),
}
