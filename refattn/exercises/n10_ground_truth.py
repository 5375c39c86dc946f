"""Exercises of notebook 10, holding a kernel against the truth."""

import functools

import numpy as np

from refattn import checks
from refattn.exercises.base import Design, Function, Kernel, Refused, Unfilled
from refattn.verify import check, probe
from refattn.verify.cases import number_type, trials
from refattn.verify.like import Reference, convention_of
from refattn.verify.mistakes import MISTAKES, output_of
from refattn.verify.wanted import wanted_of

# Of exercise 4: attentions with options, and how many sizes may be chosen.
JUDGED = (
    ("softmax_attention", {"causal": True}),
    ("local_attention", {"window": 4}),
)
SIZES, LONGEST, WIDEST = 2, 256, 64


def _budget(own_error, eps, s, v):
    return 2 * own_error + 4 * eps * (1 + abs(s).max()) * abs(v).max()


def _without_logits(own_error, eps, s, v):
    return 2 * own_error + 4 * eps * abs(v).max()


def _signed(own_error, eps, s, v):
    return 2 * own_error + 4 * eps * (1 + s.max()) * v.max()


def _unit_values(own_error, eps, s, v):
    return 2 * own_error + 4 * eps * (1 + abs(s).max())


def _once(own_error, eps, s, v):
    return _budget(own_error, eps, s, v) - own_error


def _without_one(own_error, eps, s, v):
    return 2 * own_error + 4 * eps * abs(s).max() * abs(v).max()


def _settings():
    rng = np.random.default_rng(0)
    for size, shift, mean in ((1.0, 0.0, -2), (40.0, -60.0, -2), (40.0, 60.0, 2)):
        s, v = size * rng.standard_normal((5, 7)) + shift, rng.standard_normal((7, 3)) + mean
        yield 3e-7 * size, 2.0**-23, s, v


def _unseen_by_probes(kernel):
    """1 for a kernel that the probes let pass and the check refuses."""
    if not callable(kernel):
        raise Refused(f"Give a function of q, k and v, not {type(kernel).__name__}.")
    probed = probe(kernel, causal=True)
    if not probed.filled:
        raise Unfilled
    if not probed.passed:
        wrong = next(line for line in probed.lines if line.trouble)
        raise Refused(f"A probe notices it. {wrong.case}: {wrong.trouble}")
    if check(kernel, "softmax_attention", causal=True, cases="square").passed:
        raise Refused("This one is right: it must be wrong in a way that no probe can see.")
    return 1.0


@functools.cache
def shown_by(size):
    """Names of the mistakes that one draw of normal input of this size brings to light."""
    found, dtype = set(), number_type("float32")
    for mechanism, options in JUDGED:
        reference = Reference(mechanism, convention_of(None))
        trial = next(iter(trials(mechanism, [size], dtype, options)))
        wanted = wanted_of(reference, trial, options, options, False)["y"]
        for mistake in MISTAKES:
            if mechanism in mistake.mechanisms:
                output = output_of(mistake, reference, trial, options)
                if output is not None and _differs(output[0], wanted):
                    found.add((mechanism, mistake.name, mistake.number))
    return frozenset(found)


def _differs(output, wanted):
    with np.errstate(invalid="ignore"):
        return not np.all(abs(output - wanted.value) <= wanted.budget)


def caught(sizes):
    """How many mistakes a set of sizes brings to light."""
    if not isinstance(sizes, (list, tuple)) or not 1 <= len(sizes) <= SIZES:
        raise Refused(f"Give a list of one to {SIZES} sizes (n, m, d, e).")
    chosen = []
    for size in sizes:
        try:
            size = checks.sizes(*size)
        except (TypeError, ValueError) as error:
            raise Refused(f"{size!r} is no size (n, m, d, e): {error}") from error
        if max(size[:2]) > LONGEST or max(size[2:]) > WIDEST or min(size) < 1:
            raise Refused(f"At most {LONGEST} tokens and {WIDEST} columns, and one of each.")
        chosen.append(size)
    return len(set().union(*map(shown_by, chosen)))


def _square(sizes):
    return all(n == m for n, m, *_ in sizes)


EXERCISES = {
    1: Function(
        "budget",
        points=2,
        truth=_budget,
        cases=lambda: list(_settings()),
        tolerance=lambda wanted: 1e-12 * wanted,
        hint="Twice the formula's own error, and four roundings of what equation (2) says.",
        mistakes={
            "The logits are missing: a score of size |s| is known to eps |s| only.": (
                _without_logits
            ),
            "Take absolute values first: a very negative score is rounded as coarsely as a "
            "large one.": _signed,
            "An error of the weights moves y by as much as the values are large: max|v| is "
            "missing.": _unit_values,
            "The formula's own error counts twice: a kernel may be less lucky than the "
            "formula.": _once,
            "The 1 before max|s| is missing: y itself is rounded, however small the scores "
            "are.": _without_one,
        },
    ),
    2: Kernel(
        "mended",
        points=3,
        mechanism="softmax_attention",
        options={"causal": True},
        hint="Is every factor of the formula there? Mend one thing, run the check again: a fault "
        "that is left alone is named.",
    ),
    3: Design(
        "unseen by probes",
        points=2,
        hint="Probes change inputs and compare outputs. Which mistakes treat all inputs alike?",
        score=_unseen_by_probes,
        plain=0,
        best=1,
        enough=1.0,
    ),
    4: Design(
        "two sizes",
        points=3,
        hint="Which mistakes need n != m to show, which need d != e, and which need d = e?",
        score=caught,
        plain=lambda: caught([(64, 64, 16, 16)]),
        best=lambda: caught([(200, 131, 5, 7), (64, 64, 16, 16)]),
        unit="mistakes brought to light",
        enough=1.0,
        notes={
            "All sizes have n = m: where causal masks are aligned, and what a row without keys "
            "gives, stays hidden.": _square,
            "No size has fewer keys than queries: no row is empty.": lambda sizes: all(
                n <= m for n, m, *_ in sizes
            ),
            "All sizes have d = e: a scale of the wrong dimension stays hidden.": lambda sizes: all(
                d == e for *_, d, e in sizes
            ),
            "No size has d = e: keys and values that are swapped do not even fit, and a mistake "
            "that raises an error is not the one to fear.": lambda sizes: all(
                d != e for *_, d, e in sizes
            ),
            "A tail tile that is dropped shows where the keys are more than the tile and no "
            "multiple of it: tiles have 16 to 128 keys.": lambda sizes: all(
                m <= 128 or m % 128 == 0 for _, m, *_ in sizes
            ),
        },
    ),
}
