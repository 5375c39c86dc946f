"""The mechanisms under test, their options and their inputs.

A new mechanism joins every promise of the suite by one entry in ``MECHANISMS`` (and its definition
in definitions.py): the test files loop over what stands here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import scipy

import definitions
import refattn

# n, m, d, e: one token, one key, odd sizes, n != m both ways, more than one block of 64
SHAPES = [
    (1, 1, 1, 1),
    (1, 6, 3, 2),
    (6, 1, 2, 3),
    (7, 7, 4, 5),
    (5, 9, 3, 1),
    (9, 5, 1, 2),
    (17, 17, 5, 4),
]
LONG = (133, 131, 3, 2)  # past two blocks of queries: for one run each, since the loops are slow


@dataclass
class Mechanism:
    """An attention, its definition and the options to try it with."""

    name: str
    definition: Callable
    sees: Callable  # (i, j, n, m, options) -> may query i attend to key j
    options: dict[str, Callable]  # label -> (n, m, rng) -> options
    square: tuple = ()  # labels of options that need n = m
    arrays: tuple = ()  # options that are differentiable arrays, in signature order
    cost_sizes: Callable = field(default=lambda options: dict(options))

    @property
    def attention(self):
        return getattr(refattn, self.name)

    @property
    def vjp(self):
        return getattr(refattn, f"{self.name}_vjp")

    @property
    def cost(self):
        return getattr(refattn, f"{self.name}_cost")


@dataclass
class Case:
    """One mechanism with one set of options on one set of inputs, float64 and one head."""

    mechanism: Mechanism
    label: str
    shape: tuple
    scale: float = 1.0  # factor on q: 1 is ordinary, large makes extreme logits

    def __str__(self):
        extreme = "" if self.scale == 1 else f"-x{self.scale:g}"
        return f"{self.mechanism.name}-{self.label}-{'x'.join(map(str, self.shape))}{extreme}"

    def build(self):
        """q, k, v and options; the same on every call."""
        n, m, d, e = self.shape
        rng = np.random.default_rng([n, m, d, e])
        q, k, v = (rng.standard_normal(s) for s in ((n, d), (m, d), (m, e)))
        return self.scale * q, k, v, self.mechanism.options[self.label](n, m, rng)

    def sees(self, options):
        """The dense boolean matrix of who may see whom, by the definitions."""
        n, m, *_ = self.shape
        pairs = [[self.mechanism.sees(i, j, n, m, options) for j in range(m)] for i in range(n)]
        return np.array(pairs, bool).reshape(n, m)


def rows_with_gaps(n, m, rng):
    """A random mask whose first row is empty when there is more than one."""
    mask = rng.random((n, m)) < 0.5
    mask[: 1 if n > 1 else 0] = False
    return mask


def bias_with_gaps(n, m, rng):
    bias = rng.standard_normal((n, m))
    bias[rng.random((n, m)) < 0.3] = -np.inf
    return bias


def csr(mask):
    return scipy.sparse.csr_array(mask)


def softmax_sees(i, j, n, m, options):
    mask, bias = options.get("mask"), options.get("bias")
    return bool(
        (mask is None or mask[i][j])
        and (bias is None or bias[i][j] != -np.inf)
        and (not options.get("causal") or definitions.causal_sees(i, j, n, m))
    )


def local_sees(i, j, n, m, options):
    window = {key: options[key] for key in ("window", "causal", "dilation") if key in options}
    return definitions.window_sees(i, j, n, m, **window)


def softmax_sizes(options):
    """A mask becomes its number of visible pairs; so does a bias that holds -inf."""
    mask, bias = options.get("mask"), options.get("bias")
    sizes = {**options, "mask": mask is not None, "bias": bias is not None}
    if mask is not None or (bias is not None and np.isneginf(bias).any()):
        visible = np.ones_like(bias if mask is None else mask, bool)
        visible &= True if mask is None else mask
        visible &= True if bias is None else bias > -np.inf
        if options.get("causal"):
            n, m = visible.shape
            visible &= np.tri(n, m, m - n, dtype=bool)
        sizes["nnz"] = int(visible.sum())
    return sizes


def sparse_sizes(options):
    sizes = dict(options)
    sizes["nnz"] = sizes.pop("mask").nnz
    return sizes


def dense_mask_definition(q, k, v, *, mask, **options):
    """sparse_attention's definition takes rows of booleans."""
    return definitions.sparse_attention(q, k, v, mask=mask.toarray().tolist(), **options)


MECHANISMS = {
    m.name: m
    for m in [
        Mechanism(
            "softmax_attention",
            definitions.softmax_attention,
            softmax_sees,
            {
                "plain": lambda n, m, rng: {},
                "causal": lambda n, m, rng: {"causal": True},
                "scale": lambda n, m, rng: {"scale": -0.3},
                "softcap": lambda n, m, rng: {"softcap": 0.7},
                "mask": lambda n, m, rng: {"mask": rows_with_gaps(n, m, rng)},
                "bias": lambda n, m, rng: {"bias": rng.standard_normal((n, m))},
                "bias-inf": lambda n, m, rng: {"bias": bias_with_gaps(n, m, rng)},
                "all": lambda n, m, rng: {
                    "mask": rows_with_gaps(n, m, rng),
                    "bias": bias_with_gaps(n, m, rng),
                    "causal": True,
                    "scale": 0.8,
                    "softcap": 1.5,
                },
            },
            arrays=("bias",),
            cost_sizes=softmax_sizes,
        ),
        Mechanism(
            "local_attention",
            definitions.local_attention,
            local_sees,
            {
                "self": lambda n, m, rng: {"window": 0},
                "2": lambda n, m, rng: {"window": 2},
                "left-right": lambda n, m, rng: {"window": (1, 3), "scale": 0.9},
                "causal": lambda n, m, rng: {"window": 3, "causal": True},
                "dilated": lambda n, m, rng: {"window": (2, 1), "dilation": 3},
                "causal-dilated": lambda n, m, rng: {"window": 2, "dilation": 2, "causal": True},
                "wide": lambda n, m, rng: {"window": n + m},
                "far-dilated": lambda n, m, rng: {"window": 1, "dilation": n + m + 1},
            },
        ),
        Mechanism(
            "sparse_attention",
            dense_mask_definition,
            lambda i, j, n, m, options: bool(options["mask"].toarray()[i, j]),
            {
                "random": lambda n, m, rng: {"mask": csr(rows_with_gaps(n, m, rng))},
                "none": lambda n, m, rng: {"mask": csr(np.zeros((n, m), bool))},
                "scale": lambda n, m, rng: {"mask": csr(np.ones((n, m), bool)), "scale": 1.3},
                "hierarchical": lambda n, m, rng: {"mask": refattn.masks.hierarchical(n, 3)},
            },
            square=("hierarchical",),
            cost_sizes=sparse_sizes,
        ),
    ]
}


def cases(shapes=SHAPES, scale=1.0):
    """Every mechanism with every set of options on every shape that it takes."""
    return [
        Case(mechanism, label, shape, scale)
        for mechanism in MECHANISMS.values()
        for label in mechanism.options
        for shape in shapes
        if shape[0] == shape[1] or label not in mechanism.square
    ]


def logit_size(q, k, options):
    """A = 1 + the largest scale * sum_c |q_ic k_jc| + |bias|: what rounding errors grow with."""
    scale = abs(options.get("scale") or q.shape[-1] ** -0.5)
    bias = np.asarray(options.get("bias", 0.0), float)
    largest = (scale * (abs(q) @ abs(k).mT)).max(initial=0)
    return 1 + largest + abs(bias[np.isfinite(bias)]).max(initial=0)


def tolerance(q, k, v, options, dtype=np.float64):
    """The docstring's bound: a logit is off by (d + 3) eps A at most, its exp relatively by twice
    that against the normaliser's, and sums of m positive terms by m eps more."""
    m, d = k.shape[-2:]
    eps = float(np.finfo(dtype).eps)
    return eps * (2 * (d + 4) * logit_size(q, k, options) + m + 8) * abs(v).max(initial=0)
