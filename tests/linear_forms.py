"""Forms of linear attention and Performer, and how kernels are held to the formulas: shared by the
tests of the compiled kernels and of those on CUDA."""

import numpy as np
import pytest

import refattn
from cases import flat, options_in

LINEAR = {
    "elu": {},
    "relu": {"feature_map": "relu"},
    "taylor": {"feature_map": "taylor"},
    "unnormalized": {"normalize": False},
}


def forms(omega):
    """Each form, full and causal, as parameters (name, options); and the two commonest."""
    performer = {
        "positive": {"omega": omega},
        "hyperbolic": {"omega": omega, "kind": "hyperbolic"},
        "trig": {"omega": omega, "kind": "trig"},
    }
    found = [
        pytest.param(
            name, {**options, "causal": causal}, id=f"{label}-{'causal' if causal else 'full'}"
        )
        for name, kinds in (("linear_attention", LINEAR), ("performer_attention", performer))
        for label, options in kinds.items()
        for causal in (False, True)
    ]
    return found, [form for form in found if form.id.split("-")[0] in ("elu", "positive")]


def inputs(n, d, e, lead=(), dtype=np.float32, seed=1):
    """q, k, v and dy."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((*lead, n, c)).astype(dtype) for c in (d, d, e, e)]


def attention(name):
    return getattr(refattn, name), getattr(refattn, f"{name}_vjp")


def run(name, q, k, v, dy, *, backend, **options):
    """y and all gradients, as one list."""
    forward, vjp = attention(name)
    y = forward(q, k, v, backend=backend, **options)
    return [y, *flat(vjp(dy, q, k, v, backend=backend, **options))]


def wide(x):
    return x.astype(float)


def as_exact_as_the_formula(name, q, k, v, dy, *, backend, **options):
    """Within a few times the formula's own error, which for signed features is one of a kind."""
    low = options_in(options, q.dtype)
    found = run(name, q, k, v, dy, backend=backend, **low)
    plain = run(name, q, k, v, dy, backend="numpy", **low)
    exact = run(name, *map(wide, (q, k, v, dy)), backend="numpy", **options_in(low, np.float64))
    eps = np.finfo(q.dtype).eps
    signed = options.get("kind") == "trig" or options.get("feature_map") in ("relu", "taylor")
    for x, p, t in zip(found, plain, exact, strict=True):
        assert x.dtype == p.dtype and x.shape == p.shape
        own, size = abs(p - t).max(), abs(t).max()
        assert abs(x - t).max() <= (16 if signed else 4) * own + 64 * eps * size
