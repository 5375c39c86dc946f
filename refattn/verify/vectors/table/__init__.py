"""The table of vectors: one file for the mechanisms of a folder, each with a list ``ENTRIES``.

A new mechanism joins by a file here; nothing else names it.
"""

import importlib
import pkgutil


def entries():
    """Every entry, mechanism by mechanism in the order of the files' names."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found = [e for name in names for e in importlib.import_module(f"{__name__}.{name}").ENTRIES]
    seen = [(e.mechanism, e.label) for e in found]
    twice = {x for x in seen if seen.count(x) > 1}
    if twice:
        raise ValueError(f"the table has {sorted(twice)} twice; expected one of each name")
    return found
