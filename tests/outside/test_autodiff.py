"""Every output and gradient against automatic differentiation of other formulas, in torch and jax.

The definitions beside these tests are loops for small sizes. Here are more than one tile, leading
axes that broadcast in every input, and cotangents of the log-sum-exp and of the state too.
"""

import functools
import types

import formulas
import numpy as np
import pytest
from judge import EPS
from situations import BARE, LABELS, each, named, ours, situation, whole

torch = pytest.importorskip("torch", reason="torch is not installed (extra: outside)")
pytest.importorskip("array_api_compat", reason="array-api-compat is not installed (extra: outside)")

NARROWER = float(np.finfo(float).eps) / EPS  # what errors of arithmetic scale with
TORCH = types.SimpleNamespace(elu=torch.nn.functional.elu, relu=torch.relu, softmax=torch.softmax)
# One of each mechanism. jax compiles each for a second, so that it differentiates some of them.
BY_JAX = [
    "softmax_attention everything",
    "linear_attention_chunked chunks of 16",
    "performer_attention trig, causal",
    "block_attention weighted",
    "two_level_attention max pool",
]
A_FEW = [
    *BY_JAX,
    "local_attention causal window",
    "sparse_attention hierarchical",
    "linear_attention softmax, key mask",
    "linformer_attention E and F for each head",
    "gated_attention rows open, bias",
]


def outputs_of(at, nn, flat, constants):
    told = at.options | constants
    if told.get("feature_map") is BARE:
        told["feature_map"] = "bare"
    found = getattr(formulas, at.mechanism)(nn, **whole(flat), **told)
    return {name: found[name] for name in at.pulls}


def total(outputs, pulls):
    """The scalar whose gradients are wanted. A row that saw nothing has no log-sum-exp."""
    parts = []
    for name, pull in pulls.items():
        xp = formulas.namespace(pull)
        x = outputs[name]
        parts.append(xp.sum(pull * xp.where(xp.isinf(x), xp.zeros_like(x), x)))
    return sum(parts)


def by_torch(at, dtype):
    """Outputs and gradients by torch's formulas and its autograd."""
    give = lambda x: torch.from_numpy(x).to(dtype)
    leaves = {name: give(x).requires_grad_() for name, x in named(at.arrays).items()}
    outputs = outputs_of(at, TORCH, leaves, constants(at, give))
    grads = torch.autograd.grad(total(outputs, each(give, at.pulls)), list(leaves.values()))
    found = outputs | dict(zip((f"d{name}" for name in leaves), grads, strict=True))
    return {name: x.detach().numpy() for name, x in found.items()}


def by_jax(jax, at):
    """The same in jax, float64 and compiled."""
    nn = types.SimpleNamespace(elu=jax.nn.elu, relu=jax.nn.relu, softmax=jax.nn.softmax)
    with jax.enable_x64(True):
        pulls, fixed = each(jax.numpy.asarray, at.pulls), constants(at, jax.numpy.asarray)

        def run(flat):
            outputs = outputs_of(at, nn, flat, fixed)
            return total(outputs, pulls), outputs

        given = {name: jax.numpy.asarray(x) for name, x in named(at.arrays).items()}
        grads, outputs = jax.jit(jax.grad(run, has_aux=True))(given)
    found = outputs | {f"d{name}": grads[name] for name in given}
    return {name: np.asarray(x) for name, x in found.items()}


def constants(at, give):
    return {name: give(at.options[name]) for name in ("omega",) if name in at.options}


def cancellation(at):
    """How much larger the terms of a row's denominator are than their sum, where features have
    signs: a kernel of features rounds by those, the formula of pairs does not."""
    q, k, causal = at.arrays["q"], at.arrays["k"], at.options.get("causal")
    if at.options.get("feature_map") == "taylor":
        sizes, sums = (1 + t + t * t / 2 for t in (abs(q) @ abs(k).mT, q @ k.mT))
    elif at.options.get("kind") == "trig":
        root = at.options["scale"] ** 0.5
        x, y = (root * z @ at.options["omega"].T for z in (q, k))
        grow = np.exp(root**2 * (k * k).sum(axis=-1) / 2)[..., None, :]
        c, s = (grow * (f(x) @ f(y).mT) for f in (np.cos, np.sin))
        sizes = sum(grow * (abs(f(x)) @ abs(f(y)).mT) for f in (np.cos, np.sin))
        sums = c + s
    else:
        return 1.0
    if causal:
        sizes, sums = np.tril(sizes), np.tril(sums)
    return (sizes.sum(axis=-1) / abs(sums.sum(axis=-1))).max()


@functools.cache
def truth(label):
    """torch's answers in float64, and how far off float32 may be: the rule of
    refattn.verify.wanted, with the error of torch's own formula in float32 for E."""
    at = situation(label)
    wide, low = by_torch(at, torch.float64), by_torch(at, torch.float32)
    scale = abs(at.options.get("scale") or at.arrays["q"].shape[-1] ** -0.5)
    logits = 1 + scale * abs(at.arrays["q"] @ at.arrays["k"].mT).max()
    allowed = {}
    for name, x in wide.items():
        some = np.isfinite(x)
        own = abs(low[name][some] - x[some]).max()
        allowed[name] = 2 * own + 4 * EPS * logits * abs(x[some]).max()
        allowed[name] *= cancellation(at)
    return wide, allowed


def agree(got, label, factor):
    wanted, allowed = truth(label)
    assert set(got) == set(wanted)
    for name, want in wanted.items():
        assert got[name].shape == want.shape, name
        np.testing.assert_array_equal(np.isneginf(got[name]), np.isneginf(want), name)
        some = np.isfinite(want)
        error = abs(got[name].astype(float)[some] - want[some]).max()
        assert error <= factor * allowed[name], f"{name}: off by {error:g}"


@pytest.mark.parametrize("label", LABELS)
def test_the_formula_in_float64(label):
    agree(ours(situation(label), np.float64), label, NARROWER)


@pytest.mark.parametrize("label", LABELS)
def test_the_formula_in_float32(label):
    got = ours(situation(label), np.float32)
    assert all(x.dtype == np.float32 for x in got.values())
    agree(got, label, 1.0)


@pytest.mark.parametrize("label", LABELS)
def test_the_compiled_kernels_in_float32(label):
    got = ours(situation(label), np.float32, "numba")
    assert all(x.dtype == np.float32 for x in got.values())
    agree(got, label, 1.0)


@pytest.mark.parametrize("label", LABELS)
def test_the_judge_is_not_blind(label):
    """Each part off by one in 2^36, some thousand times less than float32 resolves, or NaN, is
    refused."""
    wanted, _ = truth(label)
    agree(wanted, label, NARROWER)
    for name, x in wanted.items():
        hole = x.copy()
        hole.flat[np.flatnonzero(np.isfinite(x))[-1]] = np.nan
        for wrong in (x * (1 + 2.0**-36), hole):
            with pytest.raises(AssertionError, match=f"{name}: off by"):
                agree(wanted | {name: wrong}, label, NARROWER)


@pytest.mark.parametrize("label", BY_JAX)
def test_jax_says_the_same_as_torch(label):
    jax = pytest.importorskip("jax", reason="jax is not installed (extra: outside)")
    agree(by_jax(jax, situation(label)), label, NARROWER)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("label", A_FEW)
def test_forward_mode(label):
    """sum dy * (J dx) by torch's forward mode, which has rules of its own, and refattn's J^T dy."""
    at = situation(label)
    rng = np.random.default_rng(7)
    give = torch.from_numpy
    flat = named(at.arrays)
    moves = {
        name: np.where(np.isfinite(x), rng.standard_normal(x.shape), 0) for name, x in flat.items()
    }
    fixed = constants(at, give)
    run = lambda inputs: total(outputs_of(at, TORCH, inputs, fixed), each(give, at.pulls))
    _, slope = torch.func.jvp(run, (each(give, flat),), (each(give, moves),))
    got, allowed = ours(at, np.float64), truth(label)[1]
    claimed = sum((got[f"d{name}"] * move).sum() for name, move in moves.items())
    room = sum(NARROWER * allowed[f"d{name}"] * abs(move).sum() for name, move in moves.items())
    assert abs(float(slope) - claimed) <= room
    assert room < EPS * sum(abs(got[f"d{name}"] * move).sum() for name, move in moves.items())
