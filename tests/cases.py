"""What every mechanism's tests are made of: the mechanisms, their options and their inputs.

Each file in ``mechanisms/`` registers attentions with their definitions; a new mechanism joins each
promise of the suite by a file there and its loops in ``definitions/``.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import mechanisms
import refattn


class Shape(NamedTuple):
    """One head: n queries, m keys, d columns of q and k, e columns of v."""

    n: int
    m: int
    d: int
    e: int


# one token, one key, odd sizes, n != m both ways
SHAPES = [
    Shape(*s)
    for s in [
        (1, 1, 1, 1),
        (1, 6, 3, 2),
        (6, 1, 2, 3),
        (7, 7, 4, 5),
        (6, 6, 3, 2),
        (5, 9, 3, 1),
        (9, 5, 1, 2),
        (17, 17, 5, 4),
    ]
]
# past two blocks of 64: for one run each, since the loops are slow
LONG = [Shape(133, 131, 3, 2), Shape(133, 133, 3, 2)]


def logit_size(q, k, options):
    """A = 1 + the largest scale * sum_c |q_ic k_jc| + |bias|: what rounding errors grow with."""
    scale = abs(options.get("scale") or q.shape[-1] ** -0.5)
    bias = np.asarray(options.get("bias", 0.0), float)
    largest = (scale * (abs(q) @ abs(k).mT)).max(initial=0)
    return 1 + largest + abs(bias[np.isfinite(bias)]).max(initial=0)


def softmax_tolerance(q, k, v, options, eps):
    """The docstring's bound: a logit is off by (d + 3) eps A at most, its exp relatively by twice
    that against the normaliser's, and sums of m positive terms by m eps more."""
    m, d = k.shape[-2:]
    return eps * (2 * (d + 4) * logit_size(q, k, options) + m + 8) * abs(v).max(initial=0)


def softmax_gradient_tolerance(q, k, v, dy, options, eps):
    """Three products of the forward's error each: the terms' size times its relative error."""
    size = max(abs(x).max(initial=1) for x in (q, k, v))
    n, m, d, e = *q.shape[-2:-1], *k.shape[-2:], v.shape[-1]
    relative = 4 * (d + e + 4) * logit_size(q, k, options) + m + n
    return eps * relative * max(n, m) * e * size**2 * abs(dy).max(initial=1)


@dataclass(frozen=True)
class Mechanism:
    """An attention, its definition, and the options to try it with.

    ``options`` maps a label to a function (shape, rng) -> options. ``takes`` says which labels fit
    which shapes; ``signed`` names the labels whose weights may be zero or negative, ``nonlinear``
    those that are not linear in v. ``arrays`` are the options with a gradient, in signature order.
    ``counted`` is the definition that costs are counted on, where it is not the plain one.
    ``dead`` makes (options, queries that see nothing, keys that nobody sees) for a shape.
    """

    name: str
    definition: Callable
    sees: Callable  # (i, j, shape, options) -> may output row i depend on key j
    options: dict[str, Callable]
    takes: Callable = lambda label, shape: True
    signed: tuple = ()
    nonlinear: tuple = ()
    arrays: tuple = ()
    cost_sizes: Callable = lambda options, shape: dict(options)
    counted: Callable | None = None
    unread: Callable = lambda options, shape, itemsize: 0  # bytes of inputs that are left alone
    dead: Callable | None = None
    tolerance: Callable = softmax_tolerance
    gradient_tolerance: Callable = softmax_gradient_tolerance

    def __str__(self):
        return self.name

    @property
    def attention(self):
        return getattr(refattn, self.name)

    @property
    def vjp(self):
        return getattr(refattn, f"{self.name}_vjp")

    @property
    def cost(self):
        return getattr(refattn, f"{self.name}_cost")


@dataclass(frozen=True)
class Case:
    """One mechanism with one set of options on one set of inputs, float64 and one head."""

    mechanism: Mechanism
    label: str
    shape: Shape
    scale: float = 1.0  # factor on q: 1 is ordinary, large makes extreme logits

    def __str__(self):
        extreme = "" if self.scale == 1 else f"-x{self.scale:g}"
        return f"{self.mechanism.name}-{self.label}-{'x'.join(map(str, self.shape))}{extreme}"

    def build(self, *lead):
        """q, k, v and options, the same on every call; ``lead`` gives q, k and v leading axes."""
        n, m, d, e = self.shape
        rng = np.random.default_rng(list(self.shape))
        q, k, v = (rng.standard_normal((*lead, *s)) for s in ((n, d), (m, d), (m, e)))
        return self.scale * q, k, v, self.mechanism.options[self.label](self.shape, rng)

    def sees(self, options):
        """The dense boolean matrix of who may see whom, by the definitions."""
        n, m, *_ = self.shape
        pairs = [
            [self.mechanism.sees(i, j, self.shape, options) for j in range(m)] for i in range(n)
        ]
        return np.array(pairs, bool).reshape(n, m)

    def tolerance(self, q, k, v, options, dtype=np.float64):
        """Largest error that arithmetic in ``dtype`` explains."""
        eps = float(np.finfo(dtype).eps)
        return self.mechanism.tolerance(q, k, v, options, eps)

    def gradient_tolerance(self, q, k, v, dy, options):
        eps = float(np.finfo(float).eps)
        return self.mechanism.gradient_tolerance(q, k, v, dy, options, eps)


def cast(value, dtype):
    """Real arrays in another dtype, inside tuples too; all else as it is."""
    if isinstance(value, tuple):
        return tuple(cast(part, dtype) for part in value)
    if isinstance(value, np.ndarray) and value.dtype in (np.float64, np.float32):
        return value.astype(dtype)
    return value


def options_in(options, dtype):
    return {name: cast(value, dtype) for name, value in options.items()}


def arrays_in(options):
    """All arrays among the options, those of csr masks and tuples included."""
    found = []
    for value in options.values():
        for part in value if isinstance(value, tuple) else (value,):
            if hasattr(part, "indptr"):
                found += [part.data, part.indices, part.indptr]
            elif isinstance(part, np.ndarray):
                found.append(part)
    return found


def flat(gradients):
    """Gradients as one list of arrays: that of a state is a pair."""
    flattened = []
    for g in gradients:
        flattened += g if isinstance(g, tuple) else [g]
    return flattened


MECHANISMS = {
    mechanism.name: mechanism
    for module in pkgutil.iter_modules(mechanisms.__path__)
    for mechanism in importlib.import_module(f"mechanisms.{module.name}").MECHANISMS
}


def cases(shapes=SHAPES, scale=1.0):
    """Every mechanism with every set of options on every shape that it takes."""
    return [
        Case(mechanism, label, Shape(*shape), scale)
        for mechanism in MECHANISMS.values()
        for label in mechanism.options
        for shape in shapes
        if mechanism.takes(label, Shape(*shape))
    ]
