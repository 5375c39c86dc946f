"""How far other software may be from refattn: the grader's rule, for any parts of an answer."""

import numpy as np

from refattn.verify.cases import eps_of

EPS = eps_of(np.dtype(np.float32))


def rounded(*arrays):
    """Numbers that float32 holds, in float64: both widths then start from the same inputs."""
    return [np.asarray(x).astype(np.float32).astype(float) for x in arrays]


def draw(seed, *shapes):
    """Normal draws that float32 holds."""
    rng = np.random.default_rng(seed)
    return rounded(*(rng.standard_normal(shape) for shape in shapes))


def logits(q, k, scale=None, bias=0.0):
    """1 + the largest |score|, with which errors of an exponential grow."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return 1 + abs(scale * (q @ k.mT)).max() + abs(bias)


def numbers(x):
    """An array of any library as NumPy's."""
    x = x.detach() if hasattr(x, "detach") else x
    return np.asarray(x)


def hold(got, run, size=1.0):
    """Hold {part: array} of other software against ``run(dtype)``, the same parts by refattn.

    E is the error of refattn in float32, as in refattn.verify.wanted; other software in another
    type gets that times the ratio of the types' eps. ``size`` is ``logits(q, k)`` where there is an
    exponential. -inf must stand in the same places.
    """
    wide, low = run(np.float64), run(np.float32)
    assert set(got) == set(wide) == set(low)
    for name, want in wide.items():
        x = numbers(got[name])
        assert x.shape == want.shape, f"{name} has shape {x.shape}, not {want.shape}"
        np.testing.assert_array_equal(np.isneginf(x.astype(float)), np.isneginf(want), name)
        some = np.isfinite(want)
        own = abs(low[name].astype(float)[some] - want[some]).max(initial=0)
        in_float32 = 2 * own + 4 * EPS * size * abs(want[some]).max(initial=0)
        allowed = in_float32 * eps_of(x.dtype) / EPS
        error = abs(x.astype(float)[some] - want[some]).max(initial=0)
        assert error <= allowed, f"{name}: off by {error:g}, allowed {allowed:g}"
