import numpy as np

from cases import Mechanism
from definitions import softmax as definitions


def mask_with_gaps(n, m, rng):
    """A random mask whose first row is empty when there is more than one."""
    mask = rng.random((n, m)) < 0.5
    mask[: 1 if n > 1 else 0] = False
    return mask


def bias_with_gaps(n, m, rng):
    bias = rng.standard_normal((n, m))
    bias[rng.random((n, m)) < 0.3] = -np.inf
    return bias


def sees(i, j, shape, options):
    mask, bias = options.get("mask"), options.get("bias")
    return bool(
        (mask is None or mask[i][j])
        and (bias is None or bias[i][j] != -np.inf)
        and (not options.get("causal") or definitions.causal_sees(i, j, shape.n, shape.m))
    )


def sizes(options, shape):
    """A mask becomes its number of visible pairs; so does a bias that holds -inf."""
    mask, bias = options.get("mask"), options.get("bias")
    sizes = {**options, "mask": mask is not None, "bias": bias is not None}
    if mask is not None or (bias is not None and np.isneginf(bias).any()):
        pairs = [(i, j) for i in range(shape.n) for j in range(shape.m)]
        sizes["nnz"] = sum(sees(i, j, shape, options) for i, j in pairs)
    return sizes


def dead(shape, rng):
    mask = rng.random((shape.n, shape.m)) < 0.7
    mask[[1, 4]], mask[:, [0, 3, 7]] = False, False
    return {"mask": mask, "softcap": 3.0}, [1, 4], [0, 3, 7]


MECHANISMS = [
    Mechanism(
        "softmax_attention",
        definitions.softmax_attention,
        sees,
        {
            "plain": lambda s, rng: {},
            "causal": lambda s, rng: {"causal": True},
            "scale": lambda s, rng: {"scale": -0.3},
            "softcap": lambda s, rng: {"softcap": 0.7},
            "mask": lambda s, rng: {"mask": mask_with_gaps(s.n, s.m, rng)},
            "bias": lambda s, rng: {"bias": rng.standard_normal((s.n, s.m))},
            "bias-inf": lambda s, rng: {"bias": bias_with_gaps(s.n, s.m, rng)},
            "all": lambda s, rng: {
                "mask": mask_with_gaps(s.n, s.m, rng),
                "bias": bias_with_gaps(s.n, s.m, rng),
                "causal": True,
                "scale": 0.8,
                "softcap": 1.5,
            },
        },
        arrays=("bias",),
        cost_sizes=sizes,
        dead=dead,
    )
]
