"""A typical setting of every mechanism, for tables that lay them side by side.

Each mechanism's folder has an ``examples.py`` with ``examples(n, d) -> list of Example`` and
``CHAPTER``, the section it belongs to; a new mechanism joins the tables by having one.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from refattn.cost import Cost


@dataclass(frozen=True)
class Example:
    """An attention with options for n tokens, and the sizes that its cost takes for them."""

    label: str
    attention: Callable
    cost: Callable
    options: dict = field(default_factory=dict)
    sizes: dict = field(default_factory=dict)

    def counted(self, n, d, *, itemsize=4) -> Cost:
        """Counted cost of one head with n queries, n keys, d columns each."""
        return self.cost(n, n, d, d, **self.sizes, itemsize=itemsize)


def examples(n, d):
    """The examples of every mechanism that has some, for n tokens and head size d,
    in the chapter's order.

    >>> [example.label for example in examples(64, 8)][0]
    'softmax'
    """
    home = Path(__file__).parent
    names = [folder.name for folder in pkgutil.iter_modules([str(home)]) if folder.ispkg]
    folders = [name for name in names if (home / name / "examples.py").exists()]
    modules = [importlib.import_module(f"refattn.{name}.examples") for name in folders]
    modules.sort(key=lambda module: module.CHAPTER)
    return [example for module in modules for example in module.examples(n, d)]
