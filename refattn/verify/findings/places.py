"""Where wrong entries sit: rows, columns, heads; and what stands in their place.

Each function takes one array of every case that was answered, and gives a sentence with {it} for
the array's name, or "" where nothing holds in all of them.
"""

import numpy as np

from refattn.verify.findings.parts import has_scores, listed

TILES = (4, 8, 16, 32, 64, 128)
FEW = 4


def instead(parts):
    """What every wrong entry is, if it is NaN, infinite or one number."""
    found = np.concatenate([part.y[part.wrong] for part in parts])
    one = f"{found[0] + 0.0:.6g}"  # -0 is 0
    kinds = {"NaN": np.isnan, "infinite": np.isinf, one: lambda y: (y == y[0]).all() & (y.size > 1)}
    words = next((words for words, holds in kinds.items() if np.all(holds(found))), "")
    if not words:
        return ""
    pairs = [(p.wrong.any(axis=-1), p.wrong.all(axis=-1)) for p in parts if p.failed]
    in_rows = all((some == every).all() for some, every in pairs)
    everywhere = all(some.all() for some, _ in pairs)
    return (
        f"Every wrong entry of {{it}} is {words}{', in whole rows' * (in_rows and not everywhere)}."
    )


def rows(parts):
    """Which rows are wrong, where it is not all of them."""
    if all(part.wrong_rows.all() for part in parts if part.failed):
        return ""
    size = "m" if parts[0].name in ("dk", "dv") else "n"
    pattern = span([part.wrong_rows for part in parts], "row", size)
    return _only(_of_zeros(parts) or pattern or _late_maximum(parts))


def columns(parts):
    """Which columns are wrong, where it is not all of them."""
    size = "d" if parts[0].name in ("dq", "dk") else "e"
    return _only(span([part.wrong_columns for part in parts], "column", size))


def heads(parts):
    """Which heads are wrong, where it is not all of them and the same ones in every case."""
    failing = [part.wrong.any(axis=(-2, -1)) for part in parts if part.failed]
    first = failing[0]
    if first.all() or not _same(failing):
        return ""
    words = {first.ndim - 1: "head", first.ndim - 2: "batch" if first.ndim == 2 else ""}
    for axis, word in words.items():
        own = first.any(axis=tuple(i for i in range(first.ndim) if i != axis), keepdims=True)
        if word and not own.all() and (first == own).all():
            return _only(_listed(own.ravel(), word))
    at = [str(tuple(map(int, i))) for i in np.argwhere(first)]
    return _only(f"heads {listed(at)}") if len(at) <= FEW else ""


def span(sets, word, size):
    """Words for what is True in these vectors, one of each case; "" where no pattern holds."""
    failing = [w for w in sets if w.any()]
    if not failing or all(w.all() for w in failing):
        return ""
    end, tail = _one_end(failing, word), _tail(sets, word, size)
    if end or not _same(failing):
        return (
            end
            or tail
            or _ends(failing, word)
            or _from(sets, word)
            or _period(sets, word)
            or _listed_anywhere(failing, word)
        )
    these, pattern = _listed(failing[0], word), tail or _period(sets, word)
    if not these:
        return pattern
    return f"{these} of {len(failing[0])}" + (f", {pattern}," if pattern else "")


def _one_end(failing, word):
    if any(len(w) > 1 for w in failing) and all(w.sum() == 1 for w in failing):
        if all(w[0] for w in failing):
            return f"the first {word}"
        if all(w[-1] for w in failing):
            return f"the last {word}"
    return ""


def _tail(sets, word, size):
    """What is left over by whole tiles; a case of less than a tile may be right."""

    def holds(tile):
        for w in sets:
            tail = np.arange(len(w)) >= len(w) // tile * tile
            if (w != tail).any() and (w.any() or len(w) > tile):
                return False
        return any(len(w) > tile for w in sets if w.any())

    tiles = [tile for tile in TILES if holds(tile)]
    if not tiles:
        return ""
    others = f" (or {listed(tiles[1:], 'or')})" if tiles[1:] else ""
    return f"the last {size} mod {tiles[0]}{others} {word}s"


def _ends(failing, word):
    """The same number at one end in cases of other lengths."""
    count = int(failing[0].sum())
    if all(w.sum() == count for w in failing):
        if all(w[:count].all() for w in failing):
            return f"the first {count} {word}s"
        if all(w[-count:].all() for w in failing):
            return f"the last {count} {word}s"
    return ""


def _from(sets, word):
    """All from one on, the same one in cases of other lengths; shorter cases are right."""
    start = min(int(np.argmax(w)) for w in sets if w.any())
    holds = start > 0 and all((w == (np.arange(len(w)) >= start)).all() for w in sets)
    return f"{word}s from {start} on" if holds else ""


def _period(sets, word):
    """Every second, third, fourth, ..."""
    first = next(w for w in sets if w.any())
    for period in (2, 3, *TILES):
        start = int(np.argmax(first))
        holds = all((w == (np.arange(len(w)) % period == start)).all() for w in sets)
        if holds and max(w.sum() for w in sets) > 2:
            nth = {2: "second", 3: "third"}.get(period, f"{period}th")
            return f"every {nth} {word}, from {word} {start} on,"
    return ""


def _listed_anywhere(failing, word):
    """The same few in cases of other lengths."""
    found = [tuple(map(int, np.flatnonzero(w))) for w in failing]
    return _listed(failing[0], word) if len(set(found)) == 1 and len(found[0]) <= FEW else ""


def _listed(w, word):
    """row 3; rows 3 and 7; rows 3 to 9; "" where they are many and scattered."""
    at = [int(i) for i in np.flatnonzero(w)]
    many = word + ("es" if word.endswith("h") else "s")
    if len(at) == 1:
        return f"{word} {at[0]}"
    if at[-1] - at[0] == len(at) - 1 and len(at) > 2:
        return f"{many} {at[0]} to {at[-1]}"
    return f"{many} {listed(at)}" if len(at) <= FEW else ""


def _same(sets):
    return all(w.shape == sets[0].shape and (w == sets[0]).all() for w in sets)


def _only(words):
    if not words:
        return ""
    one = words.split(" ")[0] in ("row", "column", "head", "batch", "every")
    one = one or words in [
        f"the {end} {word}" for end in ("first", "last") for word in ("row", "column")
    ]
    return f"Only {words} {'is' if one else 'are'} wrong in {{it}}."


def _of_zeros(parts):
    """Rows that should be 0."""
    failing = [part for part in parts if part.failed]
    zeros = [(part.wanted == 0).all(axis=-1) for part in failing]
    if all((z | ~part.wrong.any(axis=-1)).all() for z, part in zip(zeros, failing, strict=True)):
        return "rows that should be 0"
    return ""


def _late_maximum(parts):
    """Rows whose largest score comes after the first tile of keys."""
    if parts[0].name != "y" or not has_scores([part.seen for part in parts]):
        return ""
    if any(part.scores is None for part in parts):
        return ""
    for tile in reversed(TILES):
        wrong = late = others = 0
        for part in parts:
            ahead = part.scores[..., :tile].max(axis=-1, initial=-np.inf)
            later = part.scores[..., tile:].max(axis=-1, initial=-np.inf) > ahead
            rows = np.broadcast_to(part.wrong.any(axis=-1), later.shape)
            if (rows & ~later).any():
                break
            wrong, late = wrong + rows.sum(), late + later.sum()
            others += (~later).sum() if part.failed else 0
        else:
            if wrong >= max(FEW, 0.9 * late) and others:
                return f"rows whose largest score comes after the first {tile} keys"
    return ""
