"""Errors that look like those of a lower precision, and errors that grow."""

import numpy as np

from refattn.verify.cases import SPECIAL
from refattn.verify.findings.parts import ENOUGH, sizes

BITS = {"bfloat16": 8, "float16 or TF32": 11, "float32": 24}
# log2 of the error over what is wanted, root mean squares, mean over the cases: what attention
# leaves whose inputs, products or steps are rounded so (tests/test_findings.py measures it).
LEAVES = {
    "bfloat16": (-10.7, -6.5),
    "float16 or TF32": (-14.5, -10.7),
    "float32": (-28.0, -22.0),
}
SPREAD = 4.5  # how far the cases may differ in it
TENFOLD = 10.0


def rounded_once(failing):
    """Every entry is a number of a lower type, and no further off than its rounding."""
    if sum(int(part.wrong.sum()) for part in failing) < ENOUGH:
        return ""
    for name in lower_types(failing[0]):
        if all(_is_rounded(part, BITS[name]) for part in failing):
            return f"what is wanted, rounded to {name}"
    return ""


def _is_rounded(part, bits):
    """A number of so many bits, off by their spacing at most: rounded to the nearest, or cut."""
    near = part.error <= 2.0 ** (1 - bits) * abs(part.wanted) + part.budget
    return bool(near.all() and (nearest(part.y, bits) == part.y).all())


def lower_types(part):
    """The names of types of fewer bits than the kernel's."""
    return [name for name, bits in BITS.items() if 2.0**-bits > part.seen.eps]


def nearest(x, bits):
    """x rounded to so many significant bits."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits)


def low_precision(parts):
    """The error is about what a lower type leaves in every case; that of one key too, where only
    values can be rounded and no weight is wrong."""
    found = np.array([_relative(part) for part in _plain(parts)])
    if len(found) < 2 or not (np.isfinite(found) & (found > 0)).all():
        return ""
    logs = np.log2(found)
    if np.ptp(logs) > SPREAD:
        return ""
    for name in lower_types(parts[0]):
        if LEAVES[name][0] <= logs.mean() < LEAVES[name][1]:
            size = f"about 2^{round(logs.mean())} of what is wanted in every case"
            return f"The error of {{it}} is {size}, as much as {name} would leave."
    return ""


def _relative(part):
    size = np.sqrt((part.wanted**2).mean()) if part.wanted.size else 0.0
    return float(np.sqrt((part.error**2).mean()) / size) if size else 0.0


def _plain(parts):
    """The cases of normal draws."""
    return [part for part in parts if part.seen.trial.name not in SPECIAL]


def growing(parts):
    """The error grows tenfold or more over the rows of the longest case, or with the keys."""
    longest = max(parts, key=lambda part: part.y.shape[-2])
    steps = _steps(longest)
    if steps is not None and _rises(steps):
        ends = f"from about {steps[0]:.1g} in the first rows to {steps[-1]:.1g} in the last"
        return f"The error of {{it}} grows with the row, {ends}."
    by_keys = {}
    for part in _plain(parts):
        m = sizes(part.seen)["m"]
        by_keys[m] = max(by_keys.get(m, 0.0), _relative(part))
    told = {m: x for m, x in sorted(by_keys.items()) if x > 0}
    if len(told) > 3 and _rises(list(told.values())):
        first, *_, last = told
        words = (
            f"{told[first]:.1g} of what is wanted with {first} keys, {told[last]:.1g} with {last}"
        )
        return f"The error of {{it}} grows with the keys: {words}."
    return ""


def _steps(part):
    """Medians of the rows' errors in eight stretches of rows."""
    rows = part.error.max(axis=(*range(part.error.ndim - 2), -1), initial=0)
    if len(rows) < 32 or not np.isfinite(rows).all() or not part.failed:
        return None
    return [float(np.median(stretch)) for stretch in np.array_split(rows, 8)]


def _rises(values):
    return bool((np.diff(values) > 0).all() and values[-1] > TENFOLD * values[0])


def not_numbers(parts):
    """How many entries are NaN, where it is not every wrong one."""
    nan = sum(int((np.isnan(part.y) & part.wrong).sum()) for part in parts)
    total = sum(part.y.size for part in parts)
    return f"{nan} of {total} entries of {{it}} are NaN." if nan else ""


def out_of_range(parts):
    """Entries beyond the values, which no weights >= 0 of sum 1 can give."""
    outside = total = 0
    for part in parts:
        v = part.seen.trial.v.astype(float)
        if part.name != "y" or not v.size:
            return ""
        low, high = v.min(axis=-2, keepdims=True), v.max(axis=-2, keepdims=True)
        slack = part.budget
        if ((part.wanted < low - slack) | (part.wanted > high + slack)).any():
            return ""
        outside += int(((part.y < low - slack) | (part.y > high + slack)).sum())
        total += part.y.size
    if not outside:
        return ""
    return (
        f"{outside} of {total} entries of {{it}} lie beyond the values: no weights >= 0 that sum "
        "to 1 give them."
    )
