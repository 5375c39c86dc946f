"""An entry of the table of vectors: what a case is made of, before it is rounded to a dtype."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import refattn
from refattn.linear.feature_maps import feature_map_of
from refattn.verify.cases import cast, number_type
from refattn.verify.vectors.draws import Draws

DTYPES = ("float64", "float32", "float16", "bfloat16")
WIDE_DTYPES = ("float64", "float32")  # of cases that are long because a kernel's tiles are
VALUES = -0.5, 1.5  # a mean that is not 0 tells an average of all from nothing


class Sizes(NamedTuple):
    """One head: n queries, m keys, d columns of q and k, e of v; leading axes of q, k and v."""

    n: int
    m: int
    d: int
    e: int
    lead: tuple = ((), (), ())

    @property
    def heads(self):
        """The leading axes of y."""
        return np.broadcast_shapes(*self.lead)


@dataclass(frozen=True)
class Entry:
    """A case of the table.

    Attributes
    ----------
    mechanism, label : str
    sizes : Sizes
    options : dict or callable
        ``options(sizes, draws)`` makes those that hold arrays; keyword arguments of the mechanism.
    change : callable, optional
        ``change(inputs, options, sizes, draws)`` writes to the arrays.
    dtypes : tuple of str
    gradients : bool
    pulled : bool
        Whether lse and states have cotangents too; else gradients are those through y alone, as
        most kernels have them.
    small : bool
        Whether the case belongs to the set that comes with refattn.
    """

    mechanism: str
    label: str
    sizes: Sizes
    options: dict | Callable = lambda sizes, draws: {}
    change: Callable | None = None
    dtypes: tuple = DTYPES
    gradients: bool = True
    pulled: bool = False
    small: bool = False

    def build(self, dtype):
        """(inputs, options), real arrays rounded to ``dtype``."""
        draws, made = Draws(f"{self.mechanism}/{self.label}"), self.options
        options = made(self.sizes, draws) if callable(made) else dict(made)
        inputs = self.drawn(options, draws)
        if self.change is not None:
            self.change(inputs, options, self.sizes, draws)
        dtype = number_type(dtype)
        both = {**inputs, **options}
        with np.errstate(over="ignore"):
            rounded = {name: cast(x, dtype) for name, x in both.items()}
        for name in both:
            self._in_range(name, both[name], rounded[name])
        return tuple({name: rounded[name] for name in part} for part in (inputs, options))

    def drawn(self, options, draws):
        """q, k, v and the cotangents of what the forward gives."""
        if self.mechanism == "merge_attention":
            return {name: options.pop(name) for name in ("ys", "lses")}
        n, m, d, e, lead = self.sizes
        if self.mechanism == "linear_attention_step":  # one position, and no gradient
            shapes = {"q": (d,), "k": (d,), "v": (e,)}
        else:
            shapes = {"q": (n, d), "k": (m, d), "v": (m, e)}
        inputs = {
            name: draws.normal((*axes, *shape))
            for (name, shape), axes in zip(shapes.items(), lead, strict=True)
        }
        inputs["v"] = draws.uniform(inputs["v"].shape, *VALUES)
        if not self.gradients or len(shapes["q"]) == 1:
            return inputs
        heads, rows = self.sizes.heads, n
        if options.get("fuse", "concat") not in ("concat", "exact"):
            rows = options["block"]
        inputs["dy"] = draws.normal((*heads, rows, e))
        if not self.pulled:
            return inputs
        if options.get("return_lse"):
            inputs["dlse"] = draws.normal((*heads, n))
        if options.get("return_state"):
            width = feature_map_of(options.get("feature_map", "elu")).width(d)
            inputs["dS"], inputs["dz"] = (
                draws.normal((*heads, width, e)),
                draws.normal((*heads, width)),
            )
        return inputs

    def _in_range(self, name, given, rounded):
        parts = zip(given, rounded, strict=True) if isinstance(given, tuple) else [(given, rounded)]
        for x, y in parts:
            if isinstance(x, np.ndarray) and (np.isfinite(x) & ~np.isfinite(y.astype(float))).any():
                raise ValueError(f"{self.mechanism}/{self.label}: {name} has no room in {y.dtype}")


def empties(of, options, *, square=False):
    """Entries ``of(label, sizes, options)`` without keys, queries, columns of v, or heads."""
    sizes = {
        "no keys": (5, 0, 3, 2),
        "no queries": (0, 4, 3, 2),
        "nothing": (0, 0, 3, 2),
        "no columns": (4, 4, 3, 0),
        "no heads": (4, 4, 3, 2, ((0,),) * 3),
    }
    return [
        of(label, size, options, dtypes=WIDE_DTYPES)
        for label, size in sizes.items()
        if not square or size[0] == size[1]
    ]


def heads_of(*, groups=2, batch=2):
    """Leading axes of grouped queries: q (batch, 2, groups), k and v (batch, 2, 1)."""
    return (batch, 2, groups), (batch, 2, 1), (batch, 2, 1)


def attention_of(name):
    """One of refattn's attentions by its name."""
    return getattr(refattn, name)
