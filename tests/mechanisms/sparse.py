import numpy as np
import scipy

import refattn
from cases import Mechanism
from definitions import sparse as definitions
from mechanisms.softmax import mask_with_gaps


def window_sees(i, j, shape, options):
    window = {key: options[key] for key in ("window", "causal", "dilation") if key in options}
    return definitions.window_sees(i, j, shape.n, shape.m, **window)


def mask_definition(q, k, v, *, mask, **options):
    """The definition takes rows of booleans."""
    return definitions.sparse_attention(q, k, v, mask=mask.toarray().tolist(), **options)


def mask_sizes(options, shape):
    sizes = dict(options)
    sizes["nnz"] = sizes.pop("mask").nnz
    return sizes


def csr(mask):
    return scipy.sparse.csr_array(mask)


def dead_window(shape, rng):
    """Two more keys than queries: the first two lie left of every window."""
    return {"window": (0, 3)}, [], [0, 1]


def dead_pairs(shape, rng):
    mask = rng.random((shape.n, shape.m)) < 0.7
    mask[[1, 4]], mask[:, [0, 3, 7]] = False, False
    return {"mask": csr(mask)}, [1, 4], [0, 3, 7]


MECHANISMS = [
    Mechanism(
        "local_attention",
        definitions.local_attention,
        window_sees,
        {
            "self": lambda s, rng: {"window": 0},
            "2": lambda s, rng: {"window": 2},
            "left-right": lambda s, rng: {"window": (1, 3), "scale": 0.9},
            "causal": lambda s, rng: {"window": 3, "causal": True},
            "dilated": lambda s, rng: {"window": (2, 1), "dilation": 3},
            "causal-dilated": lambda s, rng: {"window": 2, "dilation": 2, "causal": True},
            "wide": lambda s, rng: {"window": s.n + s.m},
            "far-dilated": lambda s, rng: {"window": 1, "dilation": s.n + s.m + 1},
        },
        dead=dead_window,
    ),
    Mechanism(
        "sparse_attention",
        mask_definition,
        lambda i, j, shape, options: bool(options["mask"].toarray()[i, j]),
        {
            "random": lambda s, rng: {"mask": csr(mask_with_gaps(s.n, s.m, rng))},
            "none": lambda s, rng: {"mask": csr(np.zeros((s.n, s.m), bool))},
            "scale": lambda s, rng: {"mask": csr(np.ones((s.n, s.m), bool)), "scale": 1.3},
            "hierarchical": lambda s, rng: {"mask": refattn.masks.hierarchical(s.n, 3)},
        },
        takes=lambda label, s: label != "hierarchical" or s.n == s.m,
        cost_sizes=mask_sizes,
        dead=dead_pairs,
    ),
]
