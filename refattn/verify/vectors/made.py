"""From the table to cases."""

import threadpoolctl
import tqdm

from refattn.verify.vectors.case import Case
from refattn.verify.vectors.table import entries
from refattn.verify.vectors.truth import wanted_of


def made(only="", *, small=False, progress=False):
    """The cases of the table whose name holds ``only``; with ``small``, those that come with
    refattn."""
    chosen = [
        (entry, dtype)
        for entry in entries()
        if entry.small or not small
        for dtype in entry.dtypes
        if only in name_of(entry, dtype)
    ]
    if not chosen:
        raise ValueError(f"no case's name holds {only!r}; names are like {name_of(*_first())!r}")
    bar = tqdm.tqdm(chosen, disable=not progress, leave=False)
    found = []
    # E is measured: sums that threads share would come out otherwise each time.
    with threadpoolctl.threadpool_limits(1):
        for entry, dtype in bar:
            bar.set_description(name_of(entry, dtype))
            found.append(case_of(entry, dtype))
    return found


def counted(cases):
    """How many there are, in words.

    >>> from refattn.verify.vectors import load
    >>> counted(load(mechanism="merge_attention", dtype="float32"))
    '2 cases of 1 mechanism'
    """
    mechanisms = len({case.mechanism for case in cases})
    return f"{len(cases)} cases of {mechanisms} mechanism" + "s" * (mechanisms > 1)


def name_of(entry, dtype):
    return f"{entry.mechanism}/{entry.label}/{dtype}"


def case_of(entry, dtype):
    """The case that an entry of the table is in a dtype."""
    inputs, options = entry.build(dtype)
    wanted = wanted_of(entry.mechanism, inputs, options)
    values, errors, budgets = (
        {part: getattr(w, name) for part, w in wanted.items()}
        for name in ("value", "error", "budget")
    )
    name = name_of(entry, dtype)
    return Case(name, entry.mechanism, dtype, options, inputs, values, errors, budgets)


def _first():
    entry = entries()[0]
    return entry, entry.dtypes[0]
