"""What the cases that fail have in common, and those that are right have not."""

import numpy as np

from refattn.verify.cases import SPECIAL
from refattn.verify.findings.parts import Part, has_scores, listed, sizes, top_score

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
    "one key each": "one key takes most of a query's weight",
}
LARGER = 4.0
CLEARER = 10.0  # times, that the error of every case that fails is above those of the right ones
TILES = (128, 64, 32, 16, 8, 4, 2)


def which_fail(seen, arrays):
    """A sentence on the cases in which one of the arrays is wrong or missing, "" where it is all
    of them, or nothing tells them from the others, or their errors are not clearly larger."""
    wrong = [any(name not in x.got or Part(name, x).failed for name in arrays) for x in seen]
    failing = [x for x, fails in zip(seen, wrong, strict=True) if fails]
    right = [x for x, fails in zip(seen, wrong, strict=True) if not fails]
    plain = [x for x in right if x.trial.name not in SPECIAL]
    if not failing or not plain or not _clear(failing, right, arrays):
        return ""
    return (
        _made(failing)
        or _one_key(failing, right)
        or _shape(failing, right, SHAPES)
        or _scores(failing, right)
        or _sizes(failing, right)
    )


def _clear(failing, right, arrays):
    """Whether errors tell the two apart, over their budgets and over what is wanted: in half types
    a budget alone may decide which cases fail."""
    measures = [[_measures(x, arrays) for x in xs] for xs in (failing, right)]
    least, most = np.min(measures[0], axis=0), np.max(measures[1], axis=0)
    return bool((least >= CLEARER * most).all())


def _measures(x, arrays):
    """The largest error of a case over its budget, and over what is wanted."""
    if any(name not in x.got for name in arrays):
        return np.inf, np.inf
    parts = [Part(name, x) for name in arrays]
    sizes = [np.nanmax(abs(part.wanted), initial=0) or 1.0 for part in parts]
    errors = [np.max(part.error, initial=0) / size for part, size in zip(parts, sizes, strict=True)]
    over = max(part.over for part in parts)
    return over, float(np.max(np.where(np.isnan(errors), np.inf, errors)))


def _sizes(failing, right):
    """What sizes tell of the plain cases, where no special one contradicts it."""
    plain = [[x for x in xs if x.trial.name not in SPECIAL] for xs in (failing, right)]
    if not plain[0]:
        return ""
    made = [[x for x in xs if x.trial.name in SPECIAL] for xs in (failing, right)]
    return _bounds(*plain, *made) or _multiples(failing, right) or _shape(failing, right, COLUMNS)


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
        whatever = " whatever its score" if has_scores([*failing, *right]) else ""
        return f"Only with one key, whose weight is 1{whatever}, is it right."
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
    if not has_scores([*failing, *right]):
        return ""
    top = [[top_score(x) for x in xs] for xs in (failing, right)]
    if min(top[0]) < LARGER * max(top[1]):
        return ""
    wrong, fine = f"{min(top[0]):.2g}", f"{max(top[1]):.2g}"
    return f"The cases with scores of {wrong} and more fail, those of at most {fine} are right."


def _bounds(failing, right, made_failing, made_right):
    """Sizes that are all larger where it fails; or smaller."""
    for sign, ahead, behind, other in ((1, ">=", "<=", "larger"), (-1, "<=", ">=", "smaller")):
        bounds = {}
        for axis in "nmde":
            low, high, made_low, made_high = (
                [sign * sizes(x)[axis] for x in xs]
                for xs in (right, failing, made_right, made_failing)
            )
            fine, wrong = max(low), min(high)
            apart = max([fine, *made_low]) < wrong and fine < min(made_high, default=np.inf)
            if apart:
                bounds[axis] = sign * wrong, sign * fine
        if bounds:
            return _bounded(bounds, ahead, behind, other)
    return ""


def _bounded(bounds, ahead, behind, other):
    """Words for {axis: (the least that fails, the most that is right)}."""
    wrong, fine = next(iter(bounds.values()))
    these = [axis for axis, pair in bounds.items() if pair == (wrong, fine)]
    rest = [axis for axis in bounds if axis not in these]
    more = f"; {listed(rest)} {'is' if len(rest) == 1 else 'are'} {other} there too" if rest else ""
    return (
        f"The cases with {listed(these)} {ahead} {wrong} fail, those with {behind} {fine} "
        f"are right{more}."
    )


def _multiples(failing, right):
    for axis in ("m", "n", "d", "e"):
        for tile in TILES:
            if all(sizes(x)[axis] % tile for x in failing) and not any(
                sizes(x)[axis] % tile for x in right
            ):
                return f"Only the cases whose {axis} is no multiple of {tile} fail."
    return ""
