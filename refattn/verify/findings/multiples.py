"""Arrays that are the right one times a number, or plus one.

Each function takes the parts that fail and gives words for what they are, "" where it is not so.
"""

import numpy as np

from refattn.verify.findings.parts import ENOUGH, sizes

CERTAIN = 0.1  # a factor's uncertainty, relative, beyond which it is not stated


def _heads(part):
    return part.y.shape[-3] if part.y.ndim > 2 else 1


def _power(axis, power):
    return lambda part: float(sizes(part.seen)[axis]) ** power


FROM_SIZES = {
    **{f"1/{axis}": _power(axis, -1) for axis in "nmde"},
    **{axis: _power(axis, 1) for axis in "nmde"},
    **{f"1/sqrt({axis})": _power(axis, -0.5) for axis in "dmne"},
    **{f"sqrt({axis})": _power(axis, 0.5) for axis in "dmne"},
    "n/m": lambda part: _power("n", 1)(part) / (_power("m", 1)(part) or np.inf),
    "m/n": lambda part: _power("m", 1)(part) / (_power("n", 1)(part) or np.inf),
    "1/(number of heads)": lambda part: 1 / _heads(part),
    "(number of heads)": _heads,
}


def multiple(failing):
    """One factor a case: a constant, or one that the sizes give."""
    fits = [_fit(part) for part in failing]
    if not all(fits) or sum(fit[2] for fit in fits) < ENOUGH:
        return ""
    factors, slack = np.array([fit[:2] for fit in fits]).T
    surest = int(slack.argmin())
    if slack[surest] > CERTAIN * abs(factors[surest]):
        return ""
    names = list(of_sizes(failing, factors, slack))
    told = " or ".join(names[:2])
    if (abs(factors - factors[surest]) <= slack + slack[surest]).all():
        number = digits(factors[surest], slack[surest])
        times = "minus what is wanted" if number == "-1" else f"{number} times what is wanted"
        return times + (f", which is {told}" if names else "")
    if names:
        return f"{told} times what is wanted"
    return f"a multiple of what is wanted, another one in each case: {_from_to(factors)} times"


def _fit(part):
    """(factor, how far it may be off, entries that show it), or None."""
    y, w = part.y[part.region], part.wanted[part.region]
    if not np.isfinite([y, w]).all() or not w @ w > 0:
        return None
    factor = y @ w / (w @ w)
    budget = part.budget * max(1.0, abs(factor))
    if not part.explained(factor * part.wanted, part.region, budget):
        return None
    return (
        factor,
        uncertainty(part, y - factor * w, w @ w, factor),
        part.told_apart(factor * part.wanted, part.region),
    )


def of_sizes(parts, factors, slack):
    """The entries of FROM_SIZES that are these factors, one of each part."""

    def fits(give):
        return (abs(np.array([give(part) for part in parts]) - factors) <= slack).all()

    return {name: give for name, give in FROM_SIZES.items() if fits(give)}


def digits(x, slack):
    """As many digits as are certain and one more, six at most."""
    certain = np.log10(abs(x) / slack) if slack and x else 6
    return f"{x:.{int(np.clip(np.ceil(certain), 2, 6))}g}"


def _from_to(factors):
    low, high = factors.min(), factors.max()
    few = 3 if abs(high - low) > 0.01 * abs(high) else 7
    return f"{low:.{few}g} to {high:.{few}g}"


def offset(failing):
    """A number that is added to every entry."""
    found = []
    for part in failing:
        off = (part.y - part.wanted)[part.region]
        if not np.isfinite(off).all():
            return ""
        found.append(off.mean())
        if not part.explained(part.wanted + off.mean(), part.region, 2 * part.budget):
            return ""
    budgets = np.array([2 * part.budget for part in failing])
    surest = int(budgets.argmin())
    same = (abs(np.array(found) - found[surest]) <= budgets + budgets[surest]).all()
    if not same or sum(int(part.wrong.sum()) for part in failing) < ENOUGH:
        return ""
    number = digits(abs(found[surest]), budgets[surest])
    return f"{number} {'more' if found[surest] > 0 else 'less'} than what is wanted, in every entry"


def rows_multiplied(failing):
    """Another factor in each row."""
    fits = [_row_fits(part) for part in failing]
    if any(fit is None for fit in fits) or sum(fit[3] for fit in fits) < 3 * ENOUGH:
        return ""
    for words, power in (("", 1), ("divided by ", -1)):
        if all(_by_keys(part, fit, power) for part, fit in zip(failing, fits, strict=True)):
            return f"what is wanted {words or 'times '}the number of keys that the row sees"
    factors = np.concatenate([factor[told] for factor, _, told, _ in fits])
    why = ", as if only the sum of its weights were wrong" if failing[0].name == "y" else ""
    return f"row by row a multiple of what is wanted, {_from_to(factors)} times{why}"


def _row_fits(part):
    """Factors of the rows, how far each may be off, which rows tell, and the entries that show it;
    or None."""
    y, w = (np.where(part.region, x, 0) for x in (part.y, part.wanted))
    square = (w * w).sum(axis=-1)
    if not np.isfinite(y).all() or not np.isfinite(square).all():
        return None
    told, square = square > 0, np.where(square > 0, square, 1)
    factor = (y * w).sum(axis=-1) / square
    budget = part.budget * np.maximum(1, abs(factor))
    guess = factor[..., None] * part.wanted
    if _columns(part) < 3 or not part.explained(guess, part.region, budget[..., None]):
        return None
    apart = (part.region & (abs(guess - part.wanted) > 2 * part.budget)).sum(axis=-1)
    slack = uncertainty(part, (y - guess)[part.region], square, factor)
    return factor, slack, told, int(np.maximum(apart - 2, 0).sum())


def _columns(part):
    """The least number of wrong columns in a head that is wrong."""
    wrong = part.wrong[part.wrong.any(axis=(-2, -1))].any(axis=-2)
    return wrong.sum(axis=-1).min(initial=part.y.shape[-1])


def uncertainty(part, off, square, factor):
    """How far a least-squares factor may be off, from what it leaves, which may not be random."""
    left = np.sqrt((off**2).mean())
    return max(4.0, np.sqrt(off.size)) * left / np.sqrt(square) + 4 * part.seen.eps * abs(factor)


def _by_keys(part, fit, power):
    factor, slack, told, _ = fit
    if part.name != "y" or part.visible is None:
        return False
    count = np.maximum(part.visible.sum(axis=-1), 1.0) ** power
    return bool(((abs(factor - count) <= slack) & (slack <= CERTAIN * abs(factor)))[told].all())
