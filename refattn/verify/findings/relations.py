"""What a wrong array is, told by the right one: a multiple, its rows moved, a lower precision.

A relation is stated when it holds within the budget wherever the array is wrong, in every case
that fails, and is four times nearer there than the right array.
"""

import numpy as np

from refattn.verify.findings.multiples import multiple, offset, rows_multiplied
from refattn.verify.findings.parts import ENOUGH
from refattn.verify.findings.precision import rounded_once
from refattn.verify.findings.weights import OF_SOFTMAX, VALUES, is_softmax, rescaled

MOST_ROWS = 1024  # rows are looked up among each other up to here


def relation(parts):
    """A sentence with {it} for the array's name and {is_} for its verb, or ""."""
    failing = [part for part in parts if part.failed]
    known, softmax = dict(RELATIONS), all(map(is_softmax, failing))
    if failing[0].name == "y":
        known = VALUES | (OF_SOFTMAX if softmax else {}) | known
    words = next((words for words, give in known.items() if _holds(give, failing)), "")
    words = words or (rescaled(failing) if softmax else "")
    for estimate in (
        rounded_once,
        multiple,
        offset,
        _heads_reordered,
        _rows_reordered,
        rows_multiplied,
        _same_in_rows,
    ):
        words = words or estimate(failing)
    if not words:
        return ""
    everywhere = len(failing) == len(parts) and all(part.region.all() for part in parts)
    return f"{'' if everywhere else 'Where wrong, '}{{it}} {{is_}} {words}."


def _holds(give, failing):
    """Whether ``give(part)`` is what came; NaN in it says nothing, None that it does not fit."""
    shown = total = 0
    for part in failing:
        guess = give(part)
        if guess is None or guess.shape != part.y.shape:
            return False
        told = part.region & ~np.isnan(guess)
        if not part.explained(guess, told):
            return False
        shown, total = shown + part.told_apart(guess, told), total + told.sum()
    return shown >= max(ENOUGH, total / 2)


def _moved(steps, axis):
    """Everything ``steps`` places later along an axis; what comes in at the border is not told."""

    def give(part):
        at = np.arange(part.wanted.shape[axis])
        lost = (at < steps) | (at >= len(at) + steps)
        lost = lost[:, None] if axis == -2 else lost
        return np.where(lost, np.nan, np.roll(part.wanted, steps, axis))

    return give


def _written_as_rows(part):
    """The memory of the transpose, taken for that of the array."""
    return np.ascontiguousarray(part.wanted.mT).reshape(part.wanted.shape)


def _tokens_first(part):
    """Memory of (tokens, heads) taken for (heads, tokens)."""
    w = part.wanted
    return None if w.ndim < 3 else w.swapaxes(-3, -2).reshape(w.shape)


def _heads_first(part):
    """Memory of (heads, tokens) taken for (tokens, heads)."""
    w = part.wanted
    if w.ndim < 3:
        return None
    return w.reshape(*w.shape[:-3], w.shape[-2], w.shape[-3], w.shape[-1]).swapaxes(-3, -2)


RELATIONS = {
    "what is wanted, transposed": lambda part: part.wanted.mT,
    "what is wanted with its columns written where rows belong": _written_as_rows,
    "what is wanted, its memory in the order (tokens, heads)": _tokens_first,
    "what is wanted, its memory taken for (tokens, heads)": _heads_first,
    "what is wanted with its rows one place later": _moved(1, -2),
    "what is wanted with its rows one place earlier": _moved(-1, -2),
    "what is wanted with its columns one place later": _moved(1, -1),
    "what is wanted with its columns one place earlier": _moved(-1, -1),
    "what is wanted with its rows in reverse order": lambda part: part.wanted[..., ::-1, :],
    "what is wanted with its columns in reverse order": lambda part: part.wanted[..., ::-1],
}


def _heads_reordered(failing):
    found = [_heads_used(part) for part in failing]
    same = all(order is not None and order == found[0] for order in found)
    return f"what is wanted with its heads in the order {list(found[0])}" if same else ""


def _heads_used(part):
    """For each head of the array which one of the right array it is; None where it is none."""
    y, w = (x.reshape(-1, *x.shape[-2:]) for x in (part.y, part.wanted))
    if len(y) < 2 or not np.isfinite(y).all():
        return None
    order = tuple(int(abs(w - head).max(axis=(-2, -1)).argmin()) for head in y)
    told = len(set(order)) == len(order) and part.explained(w[[*order]].reshape(part.y.shape))
    return order if told else None


def _rows_reordered(failing):
    found = [_rows_used(part) for part in failing]
    if any(sources is None for sources in found):
        return ""
    if all(once for sources in found for once in sources):
        return "what is wanted with its rows in another order"
    return "made of rows that are wanted, but elsewhere"


def _rows_used(part):
    """For each head, whether it holds all rows of the right one; None where it holds others."""
    from scipy.spatial import cKDTree  # brings scipy.sparse, which refattn imports when used

    y, w = (x.reshape(-1, *x.shape[-2:]) for x in (part.y, part.wanted))
    n, e = y.shape[1:]
    if not (3 <= n <= MOST_ROWS and e > 1 and np.isfinite(y).all() and np.isfinite(w).all()):
        return None
    trees = [cKDTree(head) for head in w]
    rows = [tree.query(head, p=np.inf)[1] for tree, head in zip(trees, y, strict=True)]
    guess = np.stack([head[at] for head, at in zip(w, rows, strict=True)])
    moved = guess.reshape(part.y.shape)
    told = part.wrong.any(axis=-1, keepdims=True) & np.ones(y.shape[-1], bool)
    if part.told_apart(moved, told) < told.sum() / 2 or not part.explained(moved):
        return None
    alike = [tree.query_ball_point(head, part.budget, p=np.inf) for tree, head in zip(trees, w)]
    first = [np.array([min(others) for others in head]) for head in alike]  # equal rows are one
    return [(np.sort(f[at]) == np.sort(f)).all() for f, at in zip(first, rows, strict=True)]


def _same_in_rows(failing):
    """One row of errors in all rows."""
    if max(int(part.region.any(axis=-1).sum()) for part in failing) < 3:
        return ""
    for part in failing:
        off = np.where(part.region, part.y - part.wanted, 0)
        count = np.maximum(part.region.sum(axis=-2, keepdims=True), 1)
        guess = part.wanted + off.sum(axis=-2, keepdims=True) / count
        if not part.explained(guess, part.region, 2 * part.budget):
            return ""
    return "off by the same numbers in every row"
