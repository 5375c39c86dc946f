"""What the cases that fail have in common, and those that are right have not."""

import numpy as np

from refattn.verify.cases import SPECIAL
from refattn.verify.findings.parts import Part, listed, sizes, top_score

SHAPES = {
    "one token": lambda n, m, d, e: n == m == 1,
    "n != m": lambda n, m, d, e: n != m,
    "n > m, more queries than keys,": lambda n, m, d, e: n > m,
    "n < m, fewer queries than keys,": lambda n, m, d, e: n < m,
    "n = m": lambda n, m, d, e: n == m,
}
COLUMNS = {
    "d != e": lambda n, m, d, e: d != e,
    "d = e": lambda n, m, d, e: d == e,
}
MADE = {
    "faint keys": "keys near -30, whose features are as small as 1e-13",
    "far keys": "keys of large norm, whose features span many powers of ten",
}
LARGER = 4.0
TILES = (128, 64, 32, 16, 8, 4, 2)


def which_fail(seen, arrays):
    """A sentence on the cases in which one of the arrays is wrong or missing, "" where it is all
    of them, or nothing tells them from the others."""
    wrong = [any(name not in x.got or Part(name, x).failed for name in arrays) for x in seen]
    failing = [x for x, fails in zip(seen, wrong, strict=True) if fails]
    right = [x for x, fails in zip(seen, wrong, strict=True) if not fails]
    if not failing or not right:
        return ""
    plain = [x for x in right if x.trial.name not in SPECIAL]
    if not plain:
        return ""
    return (
        _made(failing)
        or _one_key(failing, right)
        or _shape(failing, right, SHAPES)
        or _scores(failing, right)
        or _bounds(failing, plain)
        or _multiples(failing, plain)
        or _shape(failing, plain, COLUMNS)
    )


def _made(failing):
    """Cases whose numbers were made so on purpose."""
    names = {x.trial.name for x in failing}
    name = next(iter(names))
    return (
        f"Only the case '{name}' fails: {MADE[name]}." if len(names) == 1 and name in MADE else ""
    )


def _one_key(failing, right):
    """All but those whose output is the one value, whatever the score."""
    weightless = [_gives_its_value(x) for x in right]
    if all(weightless) and not any(map(_gives_its_value, failing)):
        return "Only with one key, whose weight is 1 whatever its score, is it right."
    return ""


def _gives_its_value(x):
    v = x.trial.v.astype(float)
    return v.shape[-2] == 1 and bool(np.all(x.wanted["y"].value == v))


def _shape(failing, right, shapes):
    for words, holds in shapes.items():
        fits = [[holds(**sizes(x)) for x in xs] for xs in (failing, right)]
        if all(fits[0]) and not any(fits[1]):
            return f"Only the cases with {words} fail."
    return ""


def _scores(failing, right):
    top = [[top_score(x) for x in xs] for xs in (failing, right)]
    if min(top[0]) < LARGER * max(top[1]):
        return ""
    wrong, fine = f"{min(top[0]):.2g}", f"{max(top[1]):.2g}"
    return f"The cases with scores of {wrong} and more fail, those of at most {fine} are right."


def _bounds(failing, right):
    """Sizes that are all larger where it fails; or smaller."""
    for sign, ahead, behind, other in ((1, ">=", "<=", "larger"), (-1, "<=", ">=", "smaller")):
        bounds = {}
        for axis in "nmde":
            of_failing, of_right = ([sign * sizes(x)[axis] for x in xs] for xs in (failing, right))
            if min(of_failing) > max(of_right):
                bounds[axis] = sign * min(of_failing), sign * max(of_right)
        if bounds:
            wrong, fine = next(iter(bounds.values()))
            these = [axis for axis, pair in bounds.items() if pair == (wrong, fine)]
            rest = [axis for axis in bounds if axis not in these]
            more = ""
            if rest:
                more = f"; {listed(rest)} {'is' if len(rest) == 1 else 'are'} {other} there too"
            return (
                f"The cases with {listed(these)} {ahead} {wrong} fail, those with {behind} {fine} "
                f"are right{more}."
            )
    return ""


def _multiples(failing, right):
    for axis in ("m", "n", "d", "e"):
        for tile in TILES:
            if all(sizes(x)[axis] % tile for x in failing) and not any(
                sizes(x)[axis] % tile for x in right
            ):
                return f"Only the cases whose {axis} is no multiple of {tile} fail."
    return ""
